//! `bitnet`: run BitNet b1.58 models from the command line.

fn main() {}
