"""`python -m decoding.search`: the README's table of searches."""

from decoding.search import table

if __name__ == "__main__":
    print(table())
