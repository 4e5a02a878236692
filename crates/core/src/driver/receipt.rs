use std::any::Any;
use std::fmt::{self, Debug};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

/// What an adapter needs in order to settle or extend one delivery: a value of its own, opaque to everyone else.
///
/// It is the broker's own view of the message, too: a handler that knows the adapter asks for it as
/// [`Native<T>`](crate::handler::Native).
///
/// ```
/// use onlyonce_core::driver::Receipt;
///
/// #[derive(Debug, PartialEq, Eq, Hash)]
/// struct Offset { partition: u32, offset: u64 }
///
/// let receipt = Receipt::new(Offset { partition: 3, offset: 17 });
/// assert_eq!(receipt.get::<Offset>().map(|it| it.offset), Some(17));
/// assert_eq!(receipt.get::<String>(), None, "of another adapter");
/// ```
#[derive(Clone)]
pub struct Receipt(Arc<dyn Value>);

trait Value: Any + Debug + Send + Sync {
    fn as_any(&self) -> &dyn Any;
    fn equals(&self, other: &dyn Any) -> bool;
    fn hash_into(&self, state: &mut dyn Hasher);
}

impl<T: Any + Debug + Eq + Hash + Send + Sync> Value for T {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn equals(&self, other: &dyn Any) -> bool {
        other.downcast_ref() == Some(self)
    }

    fn hash_into(&self, mut state: &mut dyn Hasher) {
        self.hash(&mut state);
    }
}

impl Receipt {
    /// A receipt of this value.
    pub fn new<T: Any + Debug + Eq + Hash + Send + Sync>(value: T) -> Self {
        Self(Arc::new(value))
    }

    /// The value, if it is a `T`: an adapter takes what is not its own for a receipt whose lease has ended.
    #[must_use]
    pub fn get<T: Any>(&self) -> Option<&T> {
        (*self.0).as_any().downcast_ref()
    }

    /// The value itself, if it is a `T`.
    pub(crate) fn shared<T: Any + Send + Sync>(&self) -> Option<Arc<T>> {
        let value: Arc<dyn Any + Send + Sync> = self.0.clone();
        value.downcast().ok()
    }
}

impl Debug for Receipt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl PartialEq for Receipt {
    fn eq(&self, other: &Self) -> bool {
        self.0.equals((*other.0).as_any())
    }
}

impl Eq for Receipt {}

impl Hash for Receipt {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash_into(state);
    }
}
