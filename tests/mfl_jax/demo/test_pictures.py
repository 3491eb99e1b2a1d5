"""What the demo's report says of registration."""

from input_pipeline.files import write_json
from mfl_jax.demo import pictures


def test_a_pair_that_was_refused_is_listed_once_and_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "_true_error", lambda slides, folder, partner: 0.5)
    said = {"channel": 0, "score": 0.9, "error_um": 0.4}
    for name, rejected in (("a", {}), ("b", {"if": "less than 50% agree"})):
        folder = tmp_path / "slides" / name
        folder.mkdir(parents=True)
        (folder / "if.overlay.jpg").write_bytes(name.encode())
        write_json(folder / "status.json", {"registered": {"if": said}, "rejected": rejected})
    rows, shown = pictures.registration(tmp_path, tmp_path)
    assert [(row["slide"], row["partner"], row["passed"]) for row in rows] == [("a", "if", True), ("b", "if", False)]
    assert {row["picture"]: shown[row["picture"]] for row in rows} == {"overlay-a-if": b"a", "overlay-b-if": b"b"}
