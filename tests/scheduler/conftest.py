"""Small models, nodes and meshes for the scheduler's tests."""

import pytest

from scheduler import Link, ModelShape, NodeShape

MIB = 1 << 20


class Builder:
    """Makes shapes with sensible figures; tests state only what matters to them."""

    def model(self, layers=8, layer=700_000, embed=500_000, head=0, tied=True, context=1024, kv=1024, **more):
        return ModelShape(
            layers=layers, layer_bytes=layer, embed_bytes=embed, head_bytes=head, tied=tied,
            layer_flops_per_token=2.0 * layer, hidden_bytes=512, kv_bytes_per_token_per_layer=kv,
            context_tokens=context, **more,
        )  # fmt: skip

    def node(self, name, mib, speed=1.0, **more):
        return NodeShape(
            id=name, memory_bytes=int(mib * MIB), flops_per_s=1e11 * speed,
            read_bytes_per_s=2e10 * speed, **more,
        )  # fmt: skip

    def nodes(self, *sizes_mib):
        return [self.node(f"n{k}", size) for k, size in enumerate(sizes_mib)]

    def links(self, latency_s=0.005, bytes_per_s=12.5e6):
        return lambda _a, _b: Link(latency_s, bytes_per_s)


@pytest.fixture
def build():
    return Builder()
