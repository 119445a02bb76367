//! A look into the container's namespace.

use std::{fs::File, io, path::Path, thread};

use nix::{
    errno::Errno,
    net::if_::if_nametoindex,
    sched::{CloneFlags, setns},
};

use super::error::Error;

/// Whether it has an interface of that name.
///
/// # Errors
/// [`Error::NetnsGone`], [`Error::Variable`] where it is no network namespace, [`Error::Io`].
pub(super) fn has_interface(netns: &Path, ifname: &str) -> Result<bool, Error> {
    let failed = |call, source| Error::Io { call, subject: netns.display().to_string(), source };
    let file = File::open(netns).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => Error::NetnsGone(netns.to_owned()),
        _ => failed("open", source),
    })?;
    // A thread of its own, so that the delegate starts where this process did.
    let looked = thread::scope(|scope| {
        let look = scope.spawn(|| {
            setns(file, CloneFlags::CLONE_NEWNET)?;
            match if_nametoindex(ifname) {
                Ok(_) => Ok(true),
                Err(Errno::ENODEV) => Ok(false),
                Err(errno) => Err(errno),
            }
        });
        look.join().unwrap_or(Err(Errno::EIO))
    });
    looked.map_err(|errno| match errno {
        Errno::EINVAL => Error::Variable {
            name: "CNI_NETNS",
            value: netns.display().to_string(),
            reason: "it is not a network namespace",
        },
        errno => failed("look for the interface in", errno.into()),
    })
}
