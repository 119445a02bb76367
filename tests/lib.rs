//! Nothing: the tests are in `main.rs`, which is one test binary. A package needs some target that always builds.
