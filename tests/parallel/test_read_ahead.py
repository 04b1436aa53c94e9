"""Reading ahead in real runs: nothing but the waiting changes."""

from tests.support.launch import boreal, digests, metrics, write_config


def test_a_run_is_the_same_read_ahead_from_a_url_and_rehearsed(corpus, tmp_path):
    """`boreal train` twice: local files in line; the same files as URLs, with threads, and a resume drill before."""
    plain = write_config(tmp_path / "plain.yaml", corpus, tmp_path / "plain")
    expected = boreal(1, "train", plain, "data.prefetch_workers=0")
    urls = [f"data.sources.text=file://{corpus['train']}", f"data.validation=file://{corpus['valid']}"]
    found = boreal(1, "train", plain, f"checkpoint.folder={tmp_path / 'ahead'}", *urls, "--resume-drill", "2")
    assert "resume drill passed" in found
    assert digests(found) == digests(expected)
    for folder in ("plain", "ahead"):
        recorded = metrics(tmp_path / folder)
        assert list(recorded) == [1, 2, 3, 4, 5]
        assert all(0 < r["data_seconds"] < r["seconds"] for r in recorded.values())
