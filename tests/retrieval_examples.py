"""Retrieval methods with small fields, by name."""

from kvcomp import METHODS

SMALL = {"budget": 24, "sinks": 3, "local": 8, "newest": 6, "dense_layers": 0}
FIELDS = {
    "louis-kv": {"segment": (2, 7), "cluster_size": 4},
    "per-token-retrieval": {"segment": (2, 7), "cluster_size": 4},
    "stride-retrieval": {"stride": 5, "cluster_size": 4},
    "cluster-kv": {"cluster_size": 6, "output_window": 9, "output_cluster": 3},
    "quest": {"page_size": 4},
    "arkvale": {"page_size": 4},
    "free-kv": {"page_size": 4, "tau": 0.7},
}


def make(name, **fields):
    return METHODS[name](**{**SMALL, **FIELDS[name], **fields})


def louis(**fields):
    return make("louis-kv", **fields)
