"""What `experiments.collectives` reads in the text of a compiled program."""

from experiments.collectives import collectives

PROGRAM = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: bf16[8,4]) -> bf16[8,4] {
  ROOT %copy.1 = bf16[8,4]{1,0} copy(%p)
}

%layer (carry: (s32[], bf16[2,4])) -> (s32[], bf16[2,4]) {
  %cut = bf16[2,4]{1,0} get-tuple-element(%carry), index=1
  %gather = ((bf16[2,4]{1,0}), bf16[8,4]{1,0}) all-gather-start(%cut), replica_groups=mesh['a'=4,'b'=2] {'a'}, \
dimensions={0}, metadata={op_name="jit(step)/jvp()/while/body/sharding_constraint"}
  %whole = bf16[8,4]{1,0} all-gather-done(%gather), metadata={op_name="jit(step)/jvp()/while/body/x"}
  %other = bf16[8,4]{1,0} fusion(%whole), kind=kLoop, calls=%fused
  %grads = bf16[2,4]{1,0} reduce-scatter(%other), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}, \
to_apply=%add, metadata={op_name="jit(step)/transpose(jvp())/while/body/dot_general"}
  ROOT %next = (s32[], bf16[2,4]) tuple(%carry, %grads)
}

ENTRY %main (x: bf16[2,4]) -> bf16[2,4] {
  %loop = (s32[], bf16[2,4]{1,0}) while(%x), condition=%never, body=%layer, \
backend_config={"known_trip_count":{"n":"3"}}
  %both = (f32[5]{0}, s32[3]{0}) all-reduce(%p, %q), replica_groups=[4,2]<=[8], to_apply=%add, \
metadata={op_name="jit(step)/reduce_sum"}
  %total = f32[] all-reduce(%r), replica_groups=[1,8]<=[8], to_apply=%add, metadata={op_name="jit(step)/reduce_sum"}
  ROOT %last = f32[7]{0} all-reduce(%s), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
}
"""


def test_kinds_axes_bytes_and_counts():
    found = [
        (c.kind, c.axes, c.arrays, c.bytes, c.times, c.where) for c in collectives(PROGRAM, {"fsdp": 4, "tensor": 2})
    ]
    assert sorted(found) == [
        ("all-gather", "fsdp", "bf16[8,4]", 64, 3, "forward, layers"),
        ("all-reduce", "fsdp", "f32[7]", 28, 1, "unnamed"),
        ("all-reduce", "fsdp+tensor", "f32[]", 4, 1, "update"),
        ("all-reduce", "tensor", "f32[5] s32[3]", 32, 1, "update"),
        ("reduce-scatter", "fsdp", "bf16[8,4]", 64, 3, "backward, layers"),
    ]
