//! Sizes of packed tiles and grids that kernels of all GPUs have, by the formulas of `kernels/README.md`.

/// Columns of a tile of packed weights.
pub(crate) const TILE_COLS: usize = 256;
/// Bytes of a tile.
const TILE_BYTES: usize = 1024;
/// Most tokens of one decode product.
pub(crate) const DECODE_TOKENS: usize = 8;
/// Threads of kernels that take any number.
pub(crate) const THREADS: usize = 256;

/// Tiles of a row of `cols` columns.
pub(crate) fn k_tiles(cols: usize) -> usize {
    cols.div_ceil(TILE_COLS)
}

/// Codes of one token: `cols` padded to whole tiles.
pub(crate) fn padded(cols: usize) -> usize {
    k_tiles(cols) * TILE_COLS
}

/// Row tiles of a product with `n` outputs a token (pairs, for the gated form).
pub(crate) fn row_tiles(n: usize, gated: bool) -> usize {
    n.div_ceil(if gated { 8 } else { 16 })
}

/// Bytes of a packed matrix.
pub(crate) fn packed_bytes(n: usize, cols: usize, gated: bool) -> usize {
    row_tiles(n, gated).saturating_mul(k_tiles(cols)).saturating_mul(TILE_BYTES)
}

/// Blocks of a decode attention for one run of one token: up to 4 query heads each.
pub(crate) fn decode_attention_blocks(heads: usize, kv_heads: usize) -> usize {
    kv_heads * (heads / kv_heads.max(1)).div_ceil(4)
}

/// Shared memory of `bitnet_decode_attention_*`.
pub(crate) fn decode_attention_shared(head_dim: usize) -> usize {
    (6 * head_dim + 2320) * 4
}

/// Most tokens of a form: 1, 2, 4 or 8, the smallest that holds `tokens`, at most 8.
pub(crate) fn form(tokens: usize) -> usize {
    tokens.clamp(1, DECODE_TOKENS).next_power_of_two()
}

/// The names of a kernel's forms for up to 1, 2, 4 and 8 tokens.
macro_rules! by_tokens {
    ($name:literal) => {
        [concat!($name, "_1"), concat!($name, "_2"), concat!($name, "_4"), concat!($name, "_8")]
    };
}
pub(crate) use by_tokens;

/// The form of [`by_tokens`] for `tokens` tokens.
pub(crate) fn form_of(names: [&'static str; 4], tokens: usize) -> &'static str {
    names[form(tokens).ilog2() as usize]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_sizes() {
        // 2B-4T: qkv [3840, 2560], gate/up of 6912 pairs.
        assert_eq!(packed_bytes(3840, 2560, false), 3840 * 2560 / 4);
        assert_eq!(packed_bytes(6912, 2560, true), 2 * 6912 * 2560 / 4);
        assert_eq!(packed_bytes(17, 257, false), 2 * 2 * 1024);
        assert_eq!(packed_bytes(9, 1, true), 2 * 1024);
        assert_eq!((padded(1), padded(256), padded(257)), (256, 256, 512));
    }

    #[test]
    fn attention_shapes() {
        assert_eq!((decode_attention_blocks(20, 5), decode_attention_blocks(20, 4)), (5, 8));
        assert_eq!(decode_attention_shared(128), (6 * 128 + 2320) * 4);
    }

    #[test]
    fn forms_hold_their_tokens() {
        let names = by_tokens!("k");
        assert_eq!(
            [0, 1, 2, 3, 4, 5, 8, 9].map(|t| form_of(names, t)),
            ["k_1", "k_1", "k_2", "k_4", "k_4", "k_8", "k_8", "k_8"]
        );
    }
}
