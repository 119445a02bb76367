//! The loaded programs beside the model of them, on whatever a fuzzer comes up with; see `comparison`. The programs are not
//! instrumented, but the model is, and has a branch for each of theirs.
#![no_main]

#[expect(dead_code, reason = "the tests use the rest")]
#[path = "../frames.rs"]
mod frames;

#[expect(dead_code, reason = "the tests use the rest")]
mod comparison;
mod inputs;
mod worlds;

use std::{
    cell::RefCell,
    sync::atomic::{AtomicU64, Ordering},
};

use libfuzzer_sys::{Corpus, fuzz_mutator, fuzz_target, fuzzer_mutate};
use nix::libc;
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};

use crate::{comparison::Comparison, inputs::Input};

thread_local! {
    /// Of the one thread that runs inputs.
    static COMPARISON: RefCell<Comparison> = RefCell::new(Comparison::new());
}

/// How many inputs were compared; the rest can't be run.
static COMPARED: AtomicU64 = AtomicU64::new(0);

extern "C" fn report() {
    eprintln!("compared: {}", COMPARED.load(Ordering::Relaxed));
}

fuzz_target!(
    init: {
        // SAFETY: the function takes nothing and does not unwind.
        unsafe { libc::atexit(report) };
    },
    |input: &[u8]| -> Corpus {
        let Some(input) = Input::new(input) else { return Corpus::Reject };
        COMPARISON.with_borrow_mut(|comparison| match comparison.compare(&input) {
            Ok(true) => {
                COMPARED.fetch_add(1, Ordering::Relaxed);
                Corpus::Keep
            }
            Ok(false) => Corpus::Reject,
            Err(difference) => {
                report();
                panic!("a difference: {}", difference.0)
            }
        })
    }
);

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let mut random = SmallRng::seed_from_u64(seed.into());
    if random.random_ratio(1, 4) {
        return fuzzer_mutate(data, size, max_size);
    }
    let mut input = data[..size].to_vec();
    inputs::mutate(&mut input, &mut random);
    let size = input.len().min(max_size);
    data[..size].copy_from_slice(&input[..size]);
    size
});
