//! NEON with dotprod.
