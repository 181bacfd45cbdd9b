"""benchmarks/experiments/street_targets.py: queries and gallery of persons, whose lists leave nothing out."""

import runpy
from pathlib import Path

import pytest

from dan_fast.data import load_dataset
from tests.support import in_checkout

SCRIPT = str(in_checkout("benchmarks/experiments/street_targets.py"))


def test_a_person_is_halved_into_queries_and_gallery(tmp_path: Path, monkeypatch, capsys) -> None:
    street, out = tmp_path / "Street", tmp_path / "out"
    (street / "images").mkdir(parents=True)
    out.mkdir()
    rows = ["path,pid,camid,split"]
    for name, pids in (("TownCentre", [0, 0]), ("3DPeS", [1, 1, 2, 2, 2]), ("CAVIAR4REID", [3, 3]), ("SARC3D", [4, 4])):
        for place, pid in enumerate(pids):
            rows.append(f"images/{name}_{place:05d}.jpg,{pid},1,train")
            (street / rows[-1].partition(",")[0]).touch()
    (street / "manifest.csv").write_text("\n".join(rows))
    monkeypatch.setattr("sys.argv", [SCRIPT, str(street), str(out)])
    runpy.run_path(SCRIPT, run_name="__main__")
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in written] == ["3DPeS.csv", "CAVIAR4REID.csv", "SARC3D.csv"]
    dataset = load_dataset(written[0])
    parts = dataset.train, dataset.query, dataset.gallery
    found = [[(sample.path.name[-5], sample.pid, sample.camid) for sample in part] for part in parts]
    assert found == [[], [("0", 1, 0), ("2", 2, 0)], [("1", 1, 1), ("3", 2, 1), ("4", 2, 1)]]


def test_it_says_how_it_is_called(monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", [SCRIPT])
    with pytest.raises(SystemExit, match="usage: .*street_targets.py STREET FOLDER"):
        runpy.run_path(SCRIPT, run_name="__main__")
