use std::fs::Metadata;
use std::path::{Path, PathBuf};

use onlyonce_core::ErrorKind;

use crate::error::DbError;

/// Which file a path stands for.
#[derive(Debug)]
pub(crate) struct File {
    path: PathBuf,
    id: Option<Id>,
}

/// Device and inode.
type Id = (u64, u64);

impl File {
    /// The file that is there now.
    pub(crate) fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            id: std::fs::metadata(path).ok().as_ref().and_then(id),
        }
    }

    /// One that cannot be looked at (its directory may be closed to us by now) counts as there.
    fn is_unmoved(&self) -> bool {
        match std::fs::metadata(&self.path) {
            Ok(metadata) => id(&metadata) == self.id,
            Err(error) => error.kind() != std::io::ErrorKind::NotFound,
        }
    }

    /// What is committed to a file that has been deleted is lost when it is closed, and another one in its place knows
    /// nothing of it.
    pub(crate) fn check(&self) -> Result<(), DbError> {
        if self.is_unmoved() {
            return Ok(());
        }
        Err(DbError::new(
            ErrorKind::NotFound,
            false,
            format!(
                "the database {} was deleted or replaced while it was open: stop whatever uses it, put it back, and \
                 start again",
                self.path.display()
            ),
        ))
    }
}

/// Elsewhere than on Unix the system keeps an open file from being deleted.
fn id(metadata: &Metadata) -> Option<Id> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        Some((metadata.dev(), metadata.ino()))
    }
    #[cfg(not(unix))]
    {
        let _ = metadata;
        None
    }
}

/// Creates the file for its owner alone, unless it exists. SQLite gives the files beside it (`-wal`, `-shm`) the same mode.
/// What goes wrong here goes wrong again when SQLite opens it, and says so.
pub(crate) fn create(path: &Path) {
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.mode(0o600);
    }
    drop(options.open(path));
}
