"""Progress while a long text is read, and tables that stay readable where there is no terminal."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _TokensPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Speed over the last seconds."""
        return Text("" if task.speed is None else f"{task.speed:.0f} tokens/s")


def reading_progress(console: Console, *, disable: bool = False) -> Progress:
    """A bar with tokens done, tokens per second and the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _TokensPerSecond(),
        TimeRemainingColumn(),
        console=console,
        disable=disable,
    )


def table_console() -> Console:
    """Standard output. Piped output has no width of its own; a table cut to 80 columns would be unreadable there."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=140, highlight=False)
