"""Which kernels a stored format takes: what limits are reckoned by."""

import pytest

from headrace.llm.loader import kernel_kind


@pytest.mark.parametrize(
    ("format_name", "in_features", "kind"),
    [
        ("q4_1", 256, "blocks"),
        ("int4_g32_bf16", 256, "row_blocks"),
        ("int8_g32_bf16", 256, "row_blocks"),
        ("int8_g256_bf16", 256, "byte_rows"),
        ("int8_g48_bf16", 48, "plain"),
        ("uint8_g256_bf16", 256, "row_blocks"),
        ("fp8_g256_f32", 256, "plain"),
        ("bf16", 256, "plain"),
    ],
)
def test_a_format_and_its_row_choose_the_kernels(format_name, in_features, kind):
    assert kernel_kind(format_name, in_features) == kind
