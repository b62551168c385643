//! NEON without dotprod.
