"""Names of attacks in tables: their family, and whether the attacker knows of the draw.

Names are compared as keys: lower case, without punctuation, steps, norms and synonyms.
"""

import re
import unicodedata

GRADIENT = frozenset({"fgsm", "bim", "mim", "pgd", "di2fgsm", "eotpgd"})
ITERATIVE = frozenset({"bim", "mim", "pgd", "eotpgd"})
WHITE_BOX = GRADIENT | {"apgd", "apgdt", "autoattack", "fab"}
BLACK_BOX = frozenset({"square", "spsa", "nes", "nattack", "rays", "bandits", "signhunter"})
MINIMAL = frozenset({"cw", "deepfool", "sparsefool", "ddn", "fmn", "ead"})

UNBOUNDED = frozenset(
    {"cw", "ddn", "deepfool", "ead", "fmn", "jsma", "onepixel", "pixle", "sparsefool"}
)
"""Attacks that no eps bounds, unless one is stated with them."""

UNRANKED = frozenset(
    {
        "transfer", "ffgsm", "rfgsm", "nifgsm", "tifgsm", "sinifgsm", "vmifgsm", "vnifgsm", "tpgd",
        "jitter", "boundary", "hopskipjump", "zoo",
    }
)  # fmt: skip
"""Attacks of the libraries that no order is expected of, and that know of no draw.

`transfer` is what papers call an attack on a surrogate; ours of that name is stored with its flag.
"""

AWARE = frozenset(
    {
        "arc", "hinge", "subset", "meanprobpgd", "meanprobapgd", "adaptive", "aware", "worstaware",
        "autoattackrand", "eotexact",
    }
)  # fmt: skip
"""Attacks made for random answers: they use every member, or are known to average over many draws.

AutoAttack's version "rand" is here because its name fixes the draws: 20 for each gradient.
"""

HEADLINES = frozenset({"headline", "headlineaware", "headlineunaware", "worstcase", "robust"})
"""Rows that sum up others."""

KNOWN = WHITE_BOX | BLACK_BOX | MINIMAL | UNBOUNDED | UNRANKED | AWARE

ALIASES = {
    "natural": "clean", "nat": "clean", "none": "clean", "standard": "clean", "aa": "autoattack",
    "noattack": "clean", "benign": "clean", "original": "clean", "unperturbed": "clean",
    "autopgd": "apgd", "autopgdce": "apgd",
    "candw": "cw", "carliniwagner": "cw", "cwl2": "cw", "mifgsm": "mim", "ifgsm": "bim",
    "difgsm": "di2fgsm", "eot": "eotpgd", "apgdce": "apgd", "apgddlr": "apgdt", "pgdeot": "eotpgd",
    "squareattack": "square", "worst": "worstcase", "fabt": "fab", "transferattack": "transfer",
    "autoattackstandard": "autoattack", "aastandard": "autoattack", "aarand": "autoattackrand",
    "randautoattack": "autoattackrand", "exacteot": "eotexact", "adaptiveattack": "adaptive",
    "whiteboxadaptive": "adaptive", "adaptivewhitebox": "adaptive", "awareattack": "aware",
}  # fmt: skip


def ordinary(text: str) -> str:
    """Text in lower case, in one Unicode form, with plain hyphens and without invisible letters."""
    letters = unicodedata.normalize("NFKC", text.casefold())
    hyphens = ("-" if unicodedata.category(c) == "Pd" or c == "\u2212" else c for c in letters)
    return "".join(c for c in hyphens if unicodedata.category(c) != "Cf").strip()


def squeezed(name: str) -> str:
    """A name without what people write in several ways: case, spaces, hyphens, Unicode form."""
    return re.sub(r"[-_\s]", "", ordinary(name))


def attack_key(name: str) -> str:
    """`EOT-PGD` -> `eotpgd`, `C&W` -> `cw`, `PGD-20` -> `pgd`: what the rules go by.

    Of what stands in brackets only that counts which makes another attacker of it.
    """
    telling = r"\((?:[^)]*?(?<![-\w])(rand|eot|adaptive)(?!-?[a-z]))?[^)]*\)"
    plain = re.sub(telling, r" \1", ordinary(name)).replace("c&w", "cw")
    plain = re.sub(r"[-_ ](\d+|l[-_]?(inf|[012]))$", "", plain.strip())
    plain = re.sub(r"[^a-z0-9]", "", plain)
    # a random start is no random answer: of the brackets only AutoAttack's tells
    first = plain.removesuffix("rand")
    plain = first if ALIASES.get(first, first) in KNOWN - {"autoattack"} else plain
    plain = re.sub(r"^(pgd|apgd|bim|mim|eotpgd|pgdeot|cw)\d+$", r"\1", plain)
    # "natural accuracy", "clean data": what is measured is no part of the name
    measured = re.sub(r"(accuracy|acc|data|images|examples|samples|test)+$", "", plain)
    return ALIASES.get(plain) or ALIASES.get(measured, measured or plain)


def averages(key: str) -> bool:
    """Whether it is an attack that averages over draws (EoT), of however few."""
    return "eot" in key


def knows_the_draw(key: str) -> bool | None:
    """Whether an attack of this name knows that answers are drawn; None if its name is unknown.

    An average over draws (EoT) does not count: those make it who know of the draw, but two draws,
    the default of TorchAttacks, are not all members, and the name does not say how many they were.
    """
    if key in AWARE:
        return True
    return False if key in KNOWN or averages(key) else None


def steps_of(name: str) -> int | None:
    """Steps or queries that the name of an attack states: `PGD-20`, `PGD (20 steps)` -> 20.

    None if it states none, or something besides.
    """
    found = re.fullmatch(
        r"([a-z][a-z&\d -]*?)[-_ ^{(\[]*(\d+)[-_ ]*(steps?|iter(?:ation)?s?|queries)?[}\])]*",
        ordinary(name),
    )
    # the number after EoT is one of draws
    if found is None or ("eot" in found[1] and found[3] is None) or found[1].endswith("-l"):
        return None
    return int(found[2])
