//! What somebody may have meant who misspelt a name.

/// How alike two names are that may be one misspelt, from 0 to 1.
const ALIKE: f64 = 0.85;

/// The name that is most like a word, where one is.
pub fn closest<'a>(word: &str, names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let likeness = |name: &str| strsim::jaro_winkler(&word.to_lowercase(), &name.to_lowercase());
    let alike = names.into_iter().map(|name| (likeness(name), name)).filter(|(likeness, _)| *likeness >= ALIKE);
    alike.max_by(|one, two| one.0.total_cmp(&two.0)).map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_alike_or_none() {
        let names = ["Network", "IPv6Network", "SubnetLen", "SubnetMin", "SubnetMax"];
        for (word, meant) in [
            ("Newtork", Some("Network")),
            ("netwrok", Some("Network")),
            ("SubnetLength", Some("SubnetLen")),
            ("Subnet_Min", Some("SubnetMin")),
            ("Comment", None),
            ("", None),
        ] {
            assert_eq!(closest(word, names), meant, "{word}");
        }
    }
}
