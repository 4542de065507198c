"""Mutants of the bounds that no test can or need catch, and why."""

TO_SPARE = "the term is to spare, as the other one alone is above what is rounded"

LOOSER = "looser, and sound: by the eps beside the variance"
IMAGES = "the same: images have four dimensions"
EXPM1 = "torch takes expm1, whose error is a share of it; the term is for others, that take exp"
MEAN = "to spare: n - 1 sums and a division; n + 1 allows for a product with a rounded 1 / n"
FLAT = "the same: logits have two dimensions, others are refused"
ROWS = "the same: coefficients are (rows, channels, height, width) here"
TYPE = "the same: only its type, device or shape is asked for"
MORE = "sound: neurons of known sign are bounded anew too"
STEPS = "sound: any slopes in [0, 1] are, and the best are kept"
SLOWER = "the same answers, of more work"

HARMLESS: dict[tuple[str, str, str], str] = {
    ("rounding", "", "1 + abs(layer.alpha) → abs(layer.alpha)"): TO_SPARE,
    ("rounding", "_mean", "pixels + 1 → pixels"): MEAN,
    ("rounding", "_adaptive_average", "-2 → 2"): IMAGES,
    ("rounding", "_batch_norm", "layer.running_var + layer.eps → layer.running_var"): LOOSER,
    (
        "rounding",
        "_batch_norm",
        "layer.running_var + layer.eps → layer.running_var - layer.eps",
    ): LOOSER,
    ("rounding", "_celu", "1 + layer.alpha + box.magnitude → box.magnitude"): EXPM1,
    ("rounding", "_celu", "1 + layer.alpha → 1"): EXPM1,
    ("rounding", "_celu", "1 + layer.alpha → layer.alpha"): EXPM1,
    (
        "certificates",
        "certified",
        "(_of_others(plain, labels[near]) > 0).all → (_of_others(plain, labels[near]) > 0).any",
    ): SLOWER,
    ("certificates", "certified", "len(near) > 0 → len(near) < 0"): SLOWER,
    ("constraints", "_add_relu", "upper → lower (2)"): TYPE,
    ("constraints", "_add_relu", "upper → lower (3)"): TYPE,
    ("constraints", "_add_relu", "lower → upper (4)"): TYPE,
    ("margins", "_margins_after", "-1 → 1"): FLAT,
    ("relaxation", "relax_relu", "lower → upper (3)"): TYPE,
    ("pullback", "_transposed", "-2 → 2"): ROWS,
    ("slopes", "tightened", "lower → upper (2)"): TYPE,
    ("slopes", "tightened", "lower → upper (3)"): TYPE,
    ("slopes", "tightened", "lower → upper (4)"): TYPE,
    ("slopes", "tightened", "lower → upper (5)"): TYPE,
    ("slopes", "ascended", "(best[rows] <= 0).all → (best[rows] <= 0).any"): STEPS,
    (
        "slopes",
        "ascended",
        "1 - iteration / ITERATIONS → 1 + iteration / ITERATIONS",
    ): STEPS,
    ("slopes", "ascended", "1 - iteration / ITERATIONS → 1"): STEPS,
    (
        "tightening",
        "tighten",
        "is_relu(layer) and any(map(is_relu, layers[:len(trace)])) → "
        "is_relu(layer) or any(map(is_relu, layers[:len(trace)]))",
    ): MORE,
}
