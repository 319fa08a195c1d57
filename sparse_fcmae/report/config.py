"""The options of `sparse-fcmae report`."""

from dataclasses import dataclass

from sparse_fcmae.runtime.options import option


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Options of `sparse-fcmae report`."""

    runs: str | tuple[str, ...] = option(help="a run's folder, or several to compare", path=True, positional=True)
    out: str | None = option(None, help="the page [report.html in the run's folder, or in the first one's]", path=True)
    watch: bool = option(False, help="serve the page to this machine alone, renewed while the runs go on")
    port: int = option(6116, help="with `watch`: where it is served; 0 for any that is free", at_least=0, at_most=65535)
