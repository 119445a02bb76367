//! Empty on purpose: a library target makes this crate a build dependency that cargo rebuilds its user for. The
//! programs are in `main.rs`.
#![no_std]
