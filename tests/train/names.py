"""A list of names that trains in no time."""

NAMES = [
    "emma",
    "olivia",
    "ava",
    "sophia",
    "amelia",
    "mia",
    "ella",
    "anna",
    "eva",
    "lily",
    "ivy",
    "noah",
    "liam",
    "leo",
]
