"""The argument block of the products (gemm.py, matrix.py, depthwise.py): its fields."""

(
    A, A_ROW, A_IMAGE, A_GROUP, ROW_TABLE,
    B, B_PANEL, STEPS, OFFSETS,
    OUT, OUT_ROW, OUT_IMAGE, OUT_GROUP,
    GROUPS, M, MC, N,
    COL_SUMS, ROW_ZERO_POINT, ROW_SCALE, ROW_STEP, SCALE, BIAS, CLAMP, OUT_ZERO_POINT,
    ADD, ADD_ROW, ADD_IMAGE, ADD_GROUP, ADD_SCALE, ADD_ZERO_POINT,
    BAND, TILE_CONFIG, OUT_PIXEL, ADD_PIXEL, A_PIXEL, RUN,
    FIELDS,
) = range(38)  # fmt: skip
