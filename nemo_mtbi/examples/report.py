"""One self-contained HTML page about a training run. See conf/report.yaml."""

from pathlib import Path

from omegaconf import DictConfig

from nemo_mtbi.examples._launcher import announce, launcher


@launcher("report")
def main(cfg: DictConfig) -> None:
    from nemo_mtbi.evaluation.run_report import write_report

    path = write_report(Path(cfg.run), Path(cfg.output or Path(cfg.run) / "report.html"))
    announce("Report", {"page": path})


if __name__ == "__main__":
    main()
