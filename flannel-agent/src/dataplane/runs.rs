//! How often the programs run and for how long, where the kernel counts that: with `kernel.bpf_stats_enabled`, or while somebody has
//! asked for it (`BPF_ENABLE_STATS`).

use std::collections::BTreeMap;

use aya::{
    Ebpf,
    programs::{Program, ProgramError, ProgramInfo},
};
use serde::{Deserialize, Serialize};

use super::Dataplane;

/// Runs of a program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ProgramRuns {
    /// How many.
    pub count: u64,
    /// How long all took.
    pub seconds: f64,
}

impl Dataplane {
    /// Those of each program that were counted since it was loaded, in all its variants, by its name. Asked by the descriptors that this
    /// process holds: by their numbers, programs are opened with CAP_SYS_ADMIN only.
    pub fn runs(&self) -> BTreeMap<String, ProgramRuns> {
        let mut runs = BTreeMap::<_, ProgramRuns>::new();
        for (name, program) in [&self.ebpf].into_iter().chain(self.variants.values()).flat_map(Ebpf::programs) {
            // One that is not loaded has none.
            let Some(info) = info(program).ok().filter(|info| info.run_count() > 0) else { continue };
            let of_program = runs.entry(name.to_owned()).or_default();
            of_program.count += info.run_count();
            of_program.seconds += info.run_time().as_secs_f64();
        }
        runs
    }
}

fn info(program: &Program) -> Result<ProgramInfo, ProgramError> {
    match program {
        Program::SchedClassifier(program) => program.info(),
        Program::Xdp(program) => program.info(),
        _ => Err(ProgramError::NotLoaded),
    }
}
