//! Who adds and removes nodes: one trait, one file each.
