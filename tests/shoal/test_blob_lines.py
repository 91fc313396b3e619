"""`shoal status` on models' files: what is fetched, and who sent bad bytes."""

from shoal.blob_lines import blob_lines

PEER = "12D3KooWAbCdEfGhJkLmNpQrStUvWxYz1234567890abcdefgh"


def test_fetches_and_bad_sources_are_told_by_name():
    document = {
        "nodes": [{"peer": PEER, "name": "laptop"}],
        "blobs": {
            "fetches": [
                {
                    "model": "qwen",
                    "done_bytes": 1 << 30,
                    "total_bytes": 4 << 30,
                    "mb_per_s": 12.34,
                    "sources": [{"peer": PEER, "bytes": 1}],
                }
            ],
            "dropped_sources": [{"peer": PEER, "model": "qwen"}],
        },
    }
    first, second = blob_lines(document)
    assert first.startswith("fetching qwen: ")
    assert "(25 %), 12.3 MB/s from 1 source" in first
    assert second.startswith("laptop (")
    assert "sent bad bytes of qwen" in second


def test_a_daemon_that_says_nothing_of_it_costs_no_line():
    assert blob_lines({}) == []
    assert blob_lines({"blobs": {"fetches": "x", "dropped_sources": None}}) == []
