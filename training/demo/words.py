"""The words of the valley: names, towns, jobs, pets. Data only.

Names are short and drawn from small sets, and every first name goes with every last name: a model that can copy two
tokens can copy any name, so a wrong answer is a missing fact and not a spelling error. Nothing begins with a vowel
where "a" precedes it.
"""

from typing import Final


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST: Final = _words(
    """
    Ada Ben Cara Dan Ella Finn Gwen Hugo Iris Jack Kate Leo Mia Ned Olga Paul Rosa Sam Tess Vera Will Anna
    Bert Cleo Dora Emil Fay Gus Hana Ivan June Karl Lena Max Nora Otto Pia Rolf Tom Zoe
    """
)

LAST: Final = _words(
    """
    Alder Birch Cole Drake Elm Fox Grant Hill Irwin Jones King Lane Marsh North Owen Pike Quinn Reed Stone
    Thorn Underhill Vale West Young Abbot Baxter Cross Dale East Frost Glen Hart Ives Joyce Kent Lake Moss
    Nash Oaks Park Rush Snow Tate Upton Voss Ward York Ash Brook Clay
    """
)

TOWNS: Final = _words(
    """
    Dunmore Ashby Corby Derby Eaton Felton Gorham Hexham Ilford Kelso Luton Malton Norwich Oxley Pendle Ripon
    Selby Tring Wells Yarm
    """
)

JOBS: Final = _words(
    """
    baker banker builder butcher carpenter cook dentist doctor driver farmer fisher gardener judge lawyer
    miller miner nurse painter pilot potter sailor singer tailor teacher
    """
)

PETS: Final = _words(
    """
    bird cat cow crab crow dog duck fish frog goat goose hamster hen horse mouse pig pony rabbit snake turtle
    """
)

GOODS: Final = _words(
    """
    apples pears plums nuts eggs coins books cups stamps shells
    """
)

# For questions about nothing in the valley: an expert must meet strange words with grace.
STRANGE: Final = _words(
    """
    capital France planet music river computer poem story weather movie ocean history science football recipe
    language president city mountain color number dream love time money war peace art robot space moon sun
    star tree flower summer winter school game code python website email phone car train airplane energy law
    health food coffee tea water fire earth wind metal gold silver paper dragon castle wizard pirate ship
    island forest desert snowman rainbow guitar piano dance song actor painting photo camera clock letter word
    sentence grammar essay homework exam teach friend family child baby king queen world country people life
    death big small red blue green old new fast slow good bad happy sad long short best worst first last next
    favorite famous secret
    """
)
