"""Published Newton-Schulz coefficient sets for the matrix sign, each with its source.

A row ``(a, b, c)`` is one step ``a x + b x^3 + c x^5``. The sets differ in how they continue past their printed length:
``repeat`` sets repeat one row (or their last row, which is the Taylor limit) any number of times; the others were
fitted jointly for a fixed number of steps and must not be shortened or extended.
"""

from dataclasses import dataclass

__all__ = ["TABLES", "Table"]

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Table:
    """One published coefficient set: its rows, whether it may be shortened or extended, and its source."""

    rows: Rows
    source: str
    default_steps: int
    repeat: bool = False
    prefix: bool = False


_TAYLOR = (15 / 8, -10 / 8, 3 / 8)


def _safe(rows: Rows, factor: float) -> Rows:
    return tuple(tuple(c / factor ** (2 * k + 1) for k, c in enumerate(row)) for row in rows)


def _over_1024(*rows: tuple[int, ...]) -> Rows:
    return tuple(tuple(c / 1024 for c in row) for row in rows)


# arXiv 2505.16932, repository NoahAmsel/PolarExpress, before the division by the safety factor: the interval ratio
# 0.02407327424182761 as cushion, recentred.
_POLAR_EXPRESS: Rows = (
    (8.287212018145622, -23.59588651909882, 17.300387312530923),
    (4.107059111542197, -2.9478499167379084, 0.54484310829266),
    (3.9486908534822938, -2.908902115962947, 0.5518191394370131),
    (3.3184196573706055, -2.488488024314878, 0.5100489401237208),
    (2.3006520199548186, -1.6689039845747518, 0.4188073119525673),
    (1.8913014077874002, -1.2679958271945908, 0.37680408948524996),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    _TAYLOR,
)

TABLES: dict[str, Table] = {
    "classical": Table((_TAYLOR,), "Taylor expansion of s^(-1/2) about 1; kexue.fm 10922", 10, True, True),
    "jordan": Table(
        ((3.4445, -4.7750, 2.0315),), "Keller Jordan, Muon, 2024; the default of torch.optim.Muon", 5, True, True
    ),
    "su_shared": Table(((3.3748, -4.6969, 2.1433),), "kexue.fm 10922, one row fitted for five steps", 5, True, True),
    "you": Table(
        _over_1024(
            (3955, -8306, 5008),
            (3735, -6681, 3463),
            (3799, -6499, 3211),
            (4019, -6385, 2906),
            (2677, -3029, 1162),
            (2172, -1833, 682),
        ),
        "You Jiacheng, six steps fitted in 2025; printed in kexue.fm 10922",
        6,
    ),
    "su_x50": Table(
        _over_1024(
            (4140, -7553, 3571),
            (3892, -6637, 2973),
            (3668, -6456, 3021),
            (3248, -6211, 3292),
            (2792, -5759, 3796),
            (3176, -5507, 4048),
        ),
        "kexue.fm 10922, six steps fitted to the mean of the 50 largest errors",
        6,
    ),
    "su_x200": Table(
        _over_1024(
            (4059, -7178, 3279),
            (3809, -6501, 2925),
            (3488, -6308, 3063),
            (2924, -5982, 3514),
            (2439, -5439, 4261),
            (3148, -5464, 4095),
        ),
        "kexue.fm 10922, six steps fitted to the mean of the 200 largest errors",
        6,
    ),
    "su_x5": Table(
        (
            (4.6182, -12.9582, 9.3299),
            (3.8496, -7.9585, 4.3052),
            (3.5204, -7.2918, 4.0606),
            (3.2067, -6.8243, 4.2802),
            (3.2978, -5.7848, 3.8917),
        ),
        "kexue.fm 10922, five steps",
        5,
    ),
    "polar_express": Table(
        (*_safe(_POLAR_EXPRESS[:-1], 1.01), _TAYLOR),
        "arXiv 2505.16932, repository NoahAmsel/PolarExpress; safety 1.01 on every row of the list but its last",
        5,
        True,
        True,
    ),
    "polar_express_unscaled": Table(
        _POLAR_EXPRESS, "arXiv 2505.16932, the same list before the safety factor", 5, True, True
    ),
    "modded_nanogpt": Table(
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        "KellerJordan/modded-nanogpt: cushion 0.02 (its comment prints 2), safety 1.02 inside the recursion",
        5,
    ),
    "gram_newton_schulz": Table(
        _safe(_POLAR_EXPRESS[:5], 1.05), "gram-newton-schulz: the Polar Express list with safety 1.05", 5
    ),
}
