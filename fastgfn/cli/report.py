"""What a run leaves behind for people: table, histogram, TensorBoard events."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastgfn import checks
from fastgfn.models import BUNDLED
from fastgfn.models.adapter import PARTIAL
from fastgfn.ops.backends import versions
from fastgfn.tasks.rng import RandomIntegers

__all__ = ["EventWriter", "histogram", "require_plots", "show", "versions", "weights_note"]


def require_plots() -> None:
    """Refuse early, by name, if what draws and logs is not installed."""
    fix = "run `pip install 'fastgfn[plots]'` or pass --no-plots"
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        checks.missing_package("train", "matplotlib", fix)
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        checks.missing_package("train", "tensorboard", fix)


class EventWriter:
    """TensorBoard scalars; a resumed run drops the events after its checkpoint."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(folder / "events"), purge_step=first_step + 1 if first_step else None
        )

    def add(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def histogram(path: Path, before: Tensor, after: Tensor, task: RandomIntegers) -> None:
    """Exact probability of every integer before and after, with the target as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(9, 5), sharex=True)
    target = (1.0 - task.invalid_mass) / len(task.numbers)
    for axis, log_q, name in zip(axes, (before, after), ("before", "after"), strict=True):
        q = log_q.exp()
        axis.bar(range(len(q)), q.tolist(), width=0.9, color="#4477aa")
        axis.axhline(target, color="#cc3311", linewidth=1, label="target")
        axis.set_title(f"{name}: mass on anything else {1.0 - float(q.sum()):.2e}", fontsize=10)
        axis.set_ylabel("probability")
    axes[0].legend(frameon=False)
    axes[1].set_xlabel("integer")
    figure.tight_layout()
    partial = path.with_name(f"{PARTIAL}{path.name}")
    figure.savefig(partial, dpi=120, format="png")
    plt.close(figure)
    partial.replace(path)


def show(console: Console, folder: Path, summary: dict, task: RandomIntegers) -> None:
    table = Table("exact, none sampled", "before", "after", "target's own")
    own = {"invalid_mass": f"{task.invalid_mass:.2e}", "log_z_error": f"log Z = {task.log_z:.4f}"}
    for key in summary["after"]:
        table.add_row(key, f"{summary['before'][key]:.3g}", f"{summary['after'][key]:.3g}", own.get(key, "0"))
    console.print(table)
    console.print(
        f"{summary['steps']} steps, {summary['trajectories']} trajectories, {summary['tokens']} tokens, "
        f"{summary['seconds']:.0f} s; model: {summary['model']} ({summary['weights']})"
    )
    console.print(f"adapter, report.json and, unless --no-plots, events and histogram.png: {folder}")
    console.print(f"draw from it: fastgfn sample --adapter {folder}")


def weights_note(model: str) -> str:
    return "4-bit Q4_1 weights dequantised to float32" if model == BUNDLED else "as loaded"
