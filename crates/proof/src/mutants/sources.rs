//! Which code the planted bugs were noticed in.

use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

/// Where the bugs are planted, and what notices them.
const FOLDERS: [&str; 4] = [
    "core/src",
    "testkit/src",
    "proof/src/mutants",
    "proof/src/simulate",
];

/// Of all files in these folders, and of where they are.
pub fn digest() -> Result<String, String> {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut digest = Sha256::new();
    for folder in FOLDERS {
        let mut files = Vec::new();
        collect(&crates.join(folder), &mut files)?;
        files.sort();
        for file in files {
            let text = fs::read(&file).map_err(|error| format!("{}: {error}", file.display()))?;
            let place = file.strip_prefix(&crates).unwrap_or(&file);
            digest.update(place.to_string_lossy().as_bytes());
            digest.update((text.len() as u64).to_be_bytes());
            digest.update(text);
        }
    }
    let digest = digest.finalize();
    Ok(digest[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}
