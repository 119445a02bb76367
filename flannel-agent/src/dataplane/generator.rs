//! Frames for benchmarks, from a program of its own.

use aya::{
    Ebpf, EbpfLoader, include_bytes_aligned,
    programs::{ProgramError, TestRun as _, TestRunAttrs, TestRunOptions, Xdp},
};
use flannel_common::generator::Generated;

use super::DataplaneError;

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/generator"));
const PROGRAM: &str = "generate";
/// As many as a driver hands over at once (`NAPI_POLL_WEIGHT`).
const BATCH: u32 = 64;

/// Sends one frame over and over.
pub struct Generator {
    ebpf: Ebpf,
}

impl Generator {
    /// Loads the program for a frame.
    ///
    /// # Errors
    /// [`DataplaneError`].
    pub fn load(generated: &Generated) -> Result<Self, DataplaneError> {
        let mut ebpf = EbpfLoader::new().override_global("GENERATED", generated, true).load(OBJECT)?;
        program(&mut ebpf)?.load().map_err(failed("load"))?;
        Ok(Self { ebpf })
    }

    /// Sends it so many times, as XDP frames, from the network namespace of the calling thread.
    ///
    /// # Errors
    /// [`DataplaneError::Program`].
    pub fn send(&mut self, count: u32) -> Result<(), DataplaneError> {
        let frame = [0; Generated::LEN];
        let attrs = TestRunAttrs::new().xdp_live_frames(BATCH);
        let options = TestRunOptions { data_in: Some(&frame), repeat: count, attrs, ..TestRunOptions::new() };
        program(&mut self.ebpf)?.test_run(options).map_err(failed("run"))?;
        Ok(())
    }
}

fn program(ebpf: &mut Ebpf) -> Result<&mut Xdp, DataplaneError> {
    let program = ebpf.program_mut(PROGRAM).ok_or(DataplaneError::Missing(PROGRAM))?;
    program.try_into().map_err(failed("use"))
}

fn failed(call: &'static str) -> impl FnOnce(ProgramError) -> DataplaneError {
    move |source| DataplaneError::Program { call, program: PROGRAM, source }
}
