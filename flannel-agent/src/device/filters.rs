//! Programs that are attached as filters of the clsact qdisc, as where the kernel has no TCX.

use rtnetlink::packet_route::tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption};

use super::{DeviceError, Netlink};

/// Which way the packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// In.
    Ingress,
    /// Out.
    Egress,
}

/// A program that is a filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramFilter {
    /// By which it is told from others at its place.
    pub handle: u32,
    /// The program's name.
    pub program: String,
    /// The kernel's number of the program.
    pub id: u32,
}

impl Netlink {
    /// The programs that are filters of a device.
    ///
    /// # Errors
    /// [`DeviceError::Call`].
    pub async fn program_filters(&self, ifindex: u32, side: Side) -> Result<Vec<ProgramFilter>, DeviceError> {
        let filters = self.handle.traffic_filter(ifindex as i32).get();
        let filters = match side {
            Side::Ingress => filters.ingress(),
            Side::Egress => filters.egress(),
        };
        let filters = self.dump(format!("the filters of device {ifindex}"), || filters.execute()).await?;
        Ok(filters.iter().filter_map(program_filter).collect())
    }
}

fn program_filter(message: &TcMessage) -> Option<ProgramFilter> {
    let options = message.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    })?;
    let program = options.iter().find_map(|option| match option {
        TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => Some(name.clone()),
        _ => None,
    })?;
    let id = options.iter().find_map(|option| match option {
        TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => Some(*id),
        _ => None,
    })?;
    let TcHandle { major, minor } = message.header.handle;
    Some(ProgramFilter { handle: u32::from(major) << 16 | u32::from(minor), program, id })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(options: Vec<TcOption>) -> TcMessage {
        let mut message = TcMessage::default();
        message.header.handle = TcHandle { major: 0xf100, minor: 1 };
        message.attributes = vec![TcAttribute::Kind("bpf".to_owned()), TcAttribute::Options(options)];
        message
    }

    #[test]
    fn programs_are_told_from_what_a_dump_has_besides() {
        let options = vec![
            TcOption::Bpf(TcFilterBpfOption::ProgId(7)),
            TcOption::Bpf(TcFilterBpfOption::ProgName("from_pod".to_owned())),
        ];
        let expected = ProgramFilter { handle: 0xf100_0001, program: "from_pod".to_owned(), id: 7 };
        assert_eq!(program_filter(&filter(options)), Some(expected));
        // Before the filters of a priority comes one without options that stands for all of them.
        assert_eq!(program_filter(&filter(Vec::new())), None);
        assert_eq!(program_filter(&TcMessage::default()), None);
    }
}
