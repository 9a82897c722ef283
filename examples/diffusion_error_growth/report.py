"""What was measured, as tables for a terminal and as a picture."""

from examples.diffusion_error_growth.experiment import DiffusionResult, LanguageResult
from examples.diffusion_error_growth.picture import Line, Panel, panels_svg


def diffusion_table(found: DiffusionResult) -> str:
    """Settings by row, then windows, layers and pushes."""
    counts = "".join(f"{f'{n} steps':>11}" for n in found.finals)
    lines = [
        f"diffusion: {found.parameters:,} parameters, loss {found.loss_first:.3f} to {found.loss_last:.3f}",
        f"exact samples: {found.exact.accuracy:.1%} show their digit, Fréchet distance {found.exact.frechet:.2f} "
        f"(of the training images: {found.floor:.2f})",
        "",
        f"{'final error':20}{counts}{'velocity':>10}{'/ added':>9}{'same digit':>12}{'accuracy':>10}{'Fréchet':>9}",
    ]
    for title, main in found.drifts.items():
        errors = "".join(f"{each[title]:11.2e}" for each in found.finals.values())
        velocity = sum(main.velocity) / len(main.velocity)
        lines.append(
            f"{title:20}{errors}{velocity:10.1e}{main.error[-1] / main.added[-1]:9.2f}{main.same_digit:12.1%}"
            f"{main.accuracy:10.1%}{main.frechet:9.2f}"
        )
    lines += [
        "",
        "final error, int4 in one window of the steps: " + ", ".join(f"{each:.3f}" for each in found.windows),
        "final error, int4 in one kind of layer: " + ", ".join(f"{k} {v:.3f}" for k, v in found.kinds.items()),
        "",
        f"{'pushed at':20}{'random':>9}{'bright':>9}{'dim':>9}{'int4 way':>10}{'far':>9}   final size by the push's",
    ]
    for each in found.pushes:
        gains = f"{each.random:9.3f}{each.bright:9.3f}{each.dim:9.3f}{each.quantized:10.3f}{each.far:9.3f}"
        lines.append(f"{each.start:<20.0%}{gains}")
    return "\n".join(lines) + "\n"


def language_table(found: LanguageResult) -> str:
    """Settings by row, then windows, layers and the changed token."""
    head = f"{'language':20}{'KL':>10}{'first 8':>10}{'last 8':>10}{'parted':>10}{'|Δ logprob|':>13}{'lead':>7}"
    lines = [head]
    for title, each in found.growths.items():
        ends = f"{_mean(each.kl[:8]):10.2e}{_mean(each.kl[-8:]):10.2e}{_figure(each.kl_where_parted, '.2e'):>10}"
        delta = f"{_mean(each.logprob_delta):13.4f}{_figure(each.lead_where_parted, '.3f'):>7}"
        lines.append(f"{title:20}{each.kl_mean:10.2e}{ends}{delta}")
    marks = _marks(len(found.one_token.kl_same_words) + 1)
    columns = "".join(f"{n:7}" for n in marks)
    heads = ("greedy", "sampled on shared draws", "sampled, at best")
    lines += [
        "",
        "share of texts that agree: " + "; ".join(heads),
        f"{'after tokens':20}{columns} ;{columns} ;{columns}",
    ]
    for title, each in found.growths.items():
        curves = (each.greedy_agreement, each.sampled_agreement, each.best_agreement)
        lines.append(f"{title:20}" + " ;".join("".join(f"{curve[n - 1]:7.0%}" for n in marks) for curve in curves))
    lines += ["", "KL by window of the text, int4 in one of them alone:"]
    lines += [f"  window {i + 1}: " + "  ".join(f"{kl:8.1e}" for kl in row) for i, row in enumerate(found.windows)]
    lines.append("KL, int4 in one kind of layer: " + ", ".join(f"{k} {v:.3f}" for k, v in found.kinds.items()))
    one = found.one_token
    lines += ["", f"{'tokens after a changed one':34}" + "".join(f"{n:8}" for n in _marks(len(one.same_token)))]
    for title, curve in (
        ("KL, the same words follow", one.kl_same_words),
        ("KL, each goes on by itself", one.kl_own_words),
        ("share with the same token there", one.same_token),
    ):
        lines.append(f"{title:34}" + "".join(f"{curve[n - 1]:8.3f}" for n in _marks(len(curve))))
    lines.append(f"KL between different texts: {one.kl_strangers:.2f}")
    return "\n".join(lines) + "\n"


def picture(diffusion: DiffusionResult, language: LanguageResult, main_steps: int) -> str:
    """Errors over steps and over tokens; what becomes of one push, of one changed token; how long texts agree."""
    share = [i / main_steps for i in range(main_steps + 1)]
    starts = [each.start for each in diffusion.pushes]
    one, growths = language.one_token, language.growths

    def after(curve: list[float]) -> range:
        return range(1, len(curve) + 1)

    def agreements(name: str) -> list[Line]:
        return [Line(title, after(getattr(each, name)), getattr(each, name)) for title, each in growths.items()]

    pushed = diffusion.pushes
    panels = [
        Panel("diffusion: error of the state", f"share of {main_steps} steps done",
              [Line(title, share, each.error) for title, each in diffusion.drifts.items()]),
        Panel("language: KL over the same text", "tokens",
              [Line(title, after(each.kl), each.kl) for title, each in growths.items()]),
        Panel("diffusion: what is left of a push at the end", "share of steps done when it comes",
              [Line("random", starts, [each.random for each in pushed]),
               Line("where digits vary most", starts, [each.bright for each in pushed]),
               Line("all other directions", starts, [each.dim for each in pushed]),
               Line("the int4 model's error", starts, [each.quantized for each in pushed])]),
        Panel("language: KL after one changed token", "tokens later",
              [Line("the same words follow", after(one.kl_same_words), one.kl_same_words),
               Line("each goes on by itself", after(one.kl_own_words), one.kl_own_words)]),
        Panel("language: greedy texts that still agree", "tokens", agreements("greedy_agreement"), is_share=True),
        Panel("language: sampled texts that could, at best", "tokens", agreements("best_agreement"), is_share=True),
    ]  # fmt: skip
    return panels_svg(panels)


def _marks(length: int) -> list[int]:
    """1, 4, 16, … and the last."""
    return sorted({n for n in (1, 4, 16, 64) if n < length} | {length})


def _figure(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
