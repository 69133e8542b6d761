"""Names of attacks in tables: their family, and whether they are aware of the draw.

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
"""Attacks that are unbounded, unless an eps is stated."""

UNRANKED = frozenset(
    {
        "transfer", "ffgsm", "rfgsm", "nifgsm", "tifgsm", "sinifgsm", "vmifgsm", "vnifgsm", "tpgd",
        "jitter", "boundary", "hopskipjump", "zoo",
    }
)  # fmt: skip
"""Unaware attacks of the libraries for which no order is expected.

In papers `transfer` is an attack on a surrogate; this package's attack of that name is stored with
its flag `aware`.
"""

AWARE = frozenset(
    {
        "arc", "hinge", "subset", "meanprobpgd", "meanprobapgd", "adaptive", "aware", "worstaware",
        "autoattackrand", "eotexact",
    }
)  # fmt: skip
"""Attacks on randomized defences: they use every member, or average over many draws.

AutoAttack's version "rand" is included, since its name fixes the number of draws: 20 per gradient.
"""

HEADLINES = frozenset({"headline", "headlineaware", "headlineunaware", "worstcase", "robust"})
"""Rows that summarise other rows."""

KNOWN = WHITE_BOX | BLACK_BOX | MINIMAL | UNBOUNDED | UNRANKED | AWARE

ALIASES = {
    "natural": "clean", "nat": "clean", "none": "clean", "standard": "clean", "aa": "autoattack",
    "noattack": "clean", "benign": "clean", "original": "clean", "unperturbed": "clean",
    "autopgd": "apgd", "autopgdce": "apgd", "pgdce": "pgd",
    "candw": "cw", "carliniwagner": "cw", "cwl2": "cw", "mifgsm": "mim", "ifgsm": "bim",
    "difgsm": "di2fgsm", "eot": "eotpgd", "apgdce": "apgd", "apgddlr": "apgdt", "pgdeot": "eotpgd",
    "squareattack": "square", "worst": "worstcase", "fabt": "fab", "transferattack": "transfer",
    "autoattackstandard": "autoattack", "aastandard": "autoattack", "aarand": "autoattackrand",
    "randautoattack": "autoattackrand", "exacteot": "eotexact", "adaptiveattack": "adaptive",
    "whiteboxadaptive": "adaptive", "adaptivewhitebox": "adaptive", "awareattack": "aware",
}  # fmt: skip


def ordinary(text: str) -> str:
    """Text in lower case, Unicode-normalised, with plain hyphens and no invisible characters."""
    letters = unicodedata.normalize("NFKC", text.casefold())
    # in Unicode the minus sign is a mathematical symbol, not a hyphen
    hyphens = ("-" if unicodedata.category(c) == "Pd" or c == "\u2212" else c for c in letters)
    # text copied from a PDF contains soft hyphens and zero-width characters
    return "".join(c for c in hyphens if unicodedata.category(c) != "Cf").strip()


def squeezed(name: str) -> str:
    """A name without variations of case, spaces, hyphens and Unicode form."""
    return re.sub(r"[-_\s]", "", ordinary(name))


def _steps_last(name: str) -> str:
    """A name in `ordinary` form without citations and TeX's dollars, `10-step PGD` as `pgd-10`."""
    plain = re.sub(r"\s*\[[^]]*\]", "", ordinary(name).replace("$", ""))
    counted = re.fullmatch(r"(\d+)[-_ ]*(?:steps?|iter(?:ation)?s?|queries)[-_ ]+(\D+)", plain)
    return plain if counted is None else f"{counted[2].strip()}-{counted[1]}"


def attack_key(name: str) -> str:
    """The key of an attack in rules: `EOT-PGD` -> `eotpgd`, `C&W` -> `cw`, `PGD-20` -> `pgd`.

    Text in brackets counts only if it denotes another attack.
    """
    telling = r"\((?:[^)]*?(?<![-\w])(rand|eot|adaptive)(?!-?[a-z]))?[^)]*\)"
    plain = re.sub(telling, r" \1", _steps_last(name)).replace("c&w", "cw")
    # the rules compare attacks by family, whatever their steps and norm
    plain = re.sub(r"[-_ ](\d+|l[-_]?(inf|[012]))$", "", plain.strip())
    plain = re.sub(r"[^a-z0-9]", "", plain)
    # "random" may mean a random start: brackets count for AutoAttack only
    first = plain.removesuffix("rand")
    plain = first if ALIASES.get(first, first) in KNOWN - {"autoattack"} else plain
    # only for these: in other names, such as `cwl2`, the digit has a meaning
    plain = re.sub(r"^(pgd|apgd|bim|mim|eotpgd|pgdeot|cw)\d+$", r"\1", plain)
    # "natural accuracy", "clean data": the measured quantity is not part of the name
    measured = re.sub(r"(accuracy|acc|data|images|examples|samples|test)+$", "", plain)
    return ALIASES.get(plain) or ALIASES.get(measured, measured or plain)


def averages(key: str) -> bool:
    """Whether it is an attack that averages over any number of draws (EoT)."""
    return "eot" in key


def knows_the_draw(key: str) -> bool | None:
    """Whether an attack of this name is aware of the draw; None if its name is unknown.

    An average over draws (EoT) does not count: it may use only two draws, the default of
    TorchAttacks, and the name does not state their number.
    """
    if key in AWARE:
        return True
    return False if key in KNOWN or averages(key) else None


def steps_of(name: str) -> int | None:
    """Steps or queries that the name of an attack states: `PGD-20`, `PGD (20 steps)` -> 20.

    None if it states no number, or anything else.
    """
    found = re.fullmatch(
        r"([a-z][a-z&\d -]*?)[-_ ^{(\[]*(\d+)[-_ ]*(steps?|iter(?:ation)?s?|queries)?[}\])]*",
        _steps_last(name),
    )
    # after EoT it is a number of draws, in `cw-l2` a norm
    if found is None or ("eot" in found[1] and found[3] is None) or found[1].endswith("-l"):
        return None
    return int(found[2])
