# CPU:  docker build -t trimtab .
# CUDA: docker build -t trimtab --build-arg VARIANT=cuda .
# The steps are those of `make setup`, in the same order; they were run by hand on a clean folder, not in a container.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim
ARG VARIANT=cpu

# g++ compiles the CPU kernels and torch.compile's code at the first start.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home trimtab
USER trimtab
WORKDIR /home/trimtab/app
ENV PATH=/home/trimtab/venv/bin:$PATH PYTHONUNBUFFERED=1

COPY --chown=trimtab pyproject.toml constraints.txt README.md LICENSE ./
RUN python -m venv /home/trimtab/venv \
 && python -m pip install --quiet "$(grep '^pip==' constraints.txt)" \
 && if [ "$VARIANT" = cpu ]; \
    then python -m pip install --quiet "$(grep '^torch==' constraints.txt)" --index-url https://download.pytorch.org/whl/cpu; \
    else python -m pip install --quiet "$(grep '^torch==' constraints.txt)"; fi

COPY --chown=trimtab decoding decoding
COPY --chown=trimtab triton_kernels triton_kernels
COPY --chown=trimtab training training
COPY --chown=trimtab clients clients
COPY --chown=trimtab server server
RUN python -m pip install --quiet --constraint constraints.txt .

EXPOSE 8000
ENTRYPOINT ["python", "-m", "server", "--host", "0.0.0.0"]
