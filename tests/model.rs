//! The programs against the model of them: what fuzzing found, and a few thousand inputs of the same kind.

use rand::{SeedableRng as _, rngs::SmallRng};

use crate::{
    comparison::Comparison,
    inputs::{Input, mutate},
};

/// Everything in `fuzz/corpus/programs`: what `cargo xtask fuzz` found and kept.
#[test]
fn agrees_about_what_fuzzing_found() {
    in_own_namespaces(|comparison| {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/programs");
        let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        assert!(!files.is_empty());
        for file in files {
            let bytes = std::fs::read(&file).unwrap();
            expect_no_difference(comparison, &bytes, &file.display().to_string());
        }
    });
}

#[test]
fn agrees_about_mutated_frames() {
    const SEED: u64 = 5;
    const RUNS: u32 = 50_000;
    in_own_namespaces(|comparison| {
        let mut random = SmallRng::seed_from_u64(SEED);
        let mut input = Vec::new();
        let mut compared = 0;
        for run in 0..RUNS {
            mutate(&mut input, &mut random);
            compared += u32::from(expect_no_difference(comparison, &input, &format!("seed {SEED}, run {run}")));
        }
        assert!(compared > RUNS / 2, "only {compared} of {RUNS} could be compared");
    });
}

fn expect_no_difference(comparison: &mut Comparison, bytes: &[u8], what: &str) -> bool {
    let Some(input) = Input::new(bytes) else { return false };
    match comparison.compare(&input) {
        Ok(compared) => compared,
        Err(difference) => panic!("{what}: {}", difference.0),
    }
}

/// The namespaces are the thread's, and go with it.
fn in_own_namespaces(test: impl FnOnce(&mut Comparison) + Send) {
    std::thread::scope(|scope| {
        let run = scope.spawn(|| {
            let mut comparison = Comparison::new();
            test(&mut comparison);
            comparison.look_around().unwrap();
        });
        if let Err(panic) = run.join() {
            std::panic::resume_unwind(panic);
        }
    });
}
