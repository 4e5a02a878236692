use super::*;

use bytes::Bytes;
use fastrand::Rng;
use futures_util::FutureExt as _;
use futures_util::future::poll_fn;
use lapin::BasicProperties;
use lapin::protocol::basic::parse_properties;
use lapin::types::parsing::parse_field_table;
use onlyonce_core::Message;
use std::pin::Pin;
use std::task::Poll;

use crate::headers;

const CORRELATION_ID: u16 = 1 << 10;
const MESSAGE_ID: u16 = 1 << 7;
const HEADERS: u16 = 1 << 13;

fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&[kind, 0, 1], &length[..], payload, &[END]].concat()
}

fn short(text: impl AsRef<[u8]>) -> Vec<u8> {
    let mut output = Vec::new();
    wire::push_short(&mut output, text.as_ref());
    output
}

fn long(bytes: &[u8]) -> Vec<u8> {
    let mut output = Vec::new();
    wire::push_long(&mut output, bytes);
    output
}

/// A header: its name and its value, which begins with its type.
fn entry(name: impl AsRef<[u8]>, value: &[u8]) -> Vec<u8> {
    [&short(name), value].concat()
}

fn content(flags: u16, properties: &[u8]) -> Vec<u8> {
    let size = 5_u64.to_be_bytes();
    let head = [&60_u16.to_be_bytes()[..], &[0, 0], &size];
    let payload = [&head.concat(), &flags.to_be_bytes()[..], properties];
    frame(HEADER, &payload.concat())
}

/// A message of these headers, with an id after them.
fn with_headers(table: &[u8]) -> Vec<u8> {
    let properties = [long(table), short("the id")].concat();
    content(HEADERS | MESSAGE_ID, &properties)
}

fn tune(frame_max: u32) -> Vec<u8> {
    let ids = [0, 10, 0, 30];
    let values = [&[7, 0xff][..], &frame_max.to_be_bytes(), &[0, 60]].concat();
    frame(METHOD, &[&ids[..], &values].concat())
}

fn start(version: &str) -> Vec<u8> {
    let capabilities = entry("basic.nack", b"t\x01");
    let properties = [
        entry("capabilities", &[b"F", &long(&capabilities)[..]].concat()),
        entry("product", &[b"S", &long(b"RabbitMQ")[..]].concat()),
        entry("version", &[b"S", &long(version.as_bytes())[..]].concat()),
    ];
    let payload = [&[0, 10, 0, 10, 0, 9][..], &long(&properties.concat())];
    frame(METHOD, &payload.concat())
}

/// After an agreement on RabbitMQ's default.
fn filter() -> Filter {
    let mut filter = Filter::default();
    filter.read(&tune(131_072), &mut Vec::new()).unwrap();
    filter
}

fn filtered(input: &[u8]) -> Vec<u8> {
    let mut output = Vec::new();
    filter().read(input, &mut output).unwrap();
    output
}

fn refused(input: &[u8]) -> String {
    let mut output = Vec::new();
    filter().read(input, &mut output).unwrap_err().to_string()
}

/// As the client parses them.
fn properties(frame: &[u8]) -> BasicProperties {
    let properties = &frame[HEAD + 12..frame.len() - 1];
    let (rest, properties) = parse_properties(properties).unwrap();
    assert_eq!(rest, b"");
    properties
}

fn read(frame: &[u8]) -> (Message, Option<String>) {
    headers::read(&properties(&filtered(frame)), Bytes::new(), None)
}

/// The message is malformed for this reason, and has its id.
fn assert_malformed(frame: &[u8], why: &str) {
    let (message, malformed) = read(frame);
    let malformed = malformed.expect("it cannot be read whole");
    assert!(malformed.contains(why), "{malformed}");
    assert_eq!(message.dedup_id.as_deref(), Some("the id"));
}

fn nested(depth: usize, kind: u8) -> Vec<u8> {
    let mut value = b"V".to_vec();
    for _ in 0..depth {
        let name = if kind == b'F' { short("") } else { Vec::new() };
        value = [&[kind], &long(&[name, value].concat())[..]].concat();
    }
    entry("deep", &value)
}

fn deliver(routing_key: &[u8]) -> Vec<u8> {
    let payload = [
        &[0, 60, 0, 60][..],
        &short("consumer"),
        &[0; 9],
        &short("exchange"),
        &short(routing_key),
    ];
    frame(METHOD, &payload.concat())
}

/// One of each that the client can read.
fn harmless() -> Vec<u8> {
    let table = [
        entry("text", &[b"S", &long("ü".as_bytes())[..]].concat()),
        entry("bytes", &[b"x", &long(&[0xff])[..]].concat()),
        nested(MAX_DEPTH, b'F'),
        nested(MAX_DEPTH, b'A'),
    ];
    let close = [&[0, 20, 0, 40, 1, 0x94][..], &short("NOT_FOUND"), &[0; 4]];
    [
        start("4.0.5"),
        tune(131_072),
        deliver(b"key"),
        with_headers(&table.concat()),
        frame(BODY, b"\xce\xff\x00 5"),
        content(0, b""),
        frame(BODY, b""),
        frame(HEARTBEAT, b""),
        frame(METHOD, &close.concat()),
        frame(METHOD, b"\0\x3c\0\x3cof another form"),
    ]
    .concat()
}

#[test]
fn what_the_client_can_read_passes_byte_for_byte() {
    let input = harmless();
    assert_eq!(filtered(&input), input);
}

#[test]
fn it_does_not_matter_how_the_bytes_are_cut() {
    let deep = with_headers(&nested(MAX_DEPTH + 1, b'F'));
    let input = [harmless(), deep, deliver(&[0xff]), harmless()].concat();
    let expected = filtered(&input);
    for cut in 0..=input.len() {
        let (mut filter, mut output) = (filter(), Vec::new());
        filter.read(&input[..cut], &mut output).unwrap();
        assert!(expected.starts_with(&output), "cut at {cut}");
        filter.read(&input[cut..], &mut output).unwrap();
        assert_eq!(output, expected, "cut at {cut}");
    }
    for size in 1..10 {
        let (mut filter, mut output) = (filter(), Vec::new());
        for piece in input.chunks(size) {
            filter.read(piece, &mut output).unwrap();
        }
        assert_eq!(output, expected, "pieces of {size}");
    }
}

#[test]
fn a_property_that_is_not_utf8_becomes_hexadecimal() {
    let flags = CORRELATION_ID | MESSAGE_ID;
    let frame = content(flags, &[short([0xff, 0]), short([0xfe; 125])].concat());
    let (message, malformed) = read(&frame);
    assert_eq!(malformed, None);
    let id = format!("hex:{}", "fe".repeat(125));
    assert_eq!(message.dedup_id, Some(id));
    let attributes: Vec<_> = message.attributes.iter().collect();
    assert_eq!(attributes, [("amqp-correlation-id", "hex:ff00")]);
}

#[test]
fn a_property_that_is_too_long_in_hexadecimal_ends_in_an_ellipsis() {
    let frame = content(CORRELATION_ID, &short([0xff; 255]));
    let (message, malformed) = read(&frame);
    assert_eq!(malformed, None);
    let shown = message.attributes.get("amqp-correlation-id").unwrap();
    assert_eq!(shown, format!("hex:{}…", "ff".repeat(124)));
}

/// Cut, two ids could be the same, and one of the messages would be dropped as a duplicate.
#[test]
fn an_id_that_is_too_long_in_hexadecimal_is_no_id() {
    for length in [126, 255] {
        let table = entry("k", b"I\0\0\0\x07");
        let id = vec![0xff; length];
        let properties = [long(&table), short(&id)].concat();
        let (message, malformed) = read(&content(HEADERS | MESSAGE_ID, &properties));
        let malformed = malformed.unwrap();
        assert!(malformed.contains(&"ff".repeat(length)), "{malformed}");
        assert_eq!(message.dedup_id, None);
        assert_eq!(message.attributes.get("k"), Some("7"));
    }
}

#[test]
fn headers_that_are_nested_too_deep_make_the_message_malformed() {
    // The last fills a frame of 128 KiB.
    for kind in [b'F', b'A'] {
        for depth in [MAX_DEPTH + 1, 200, 1_172, 13_782, 18_000] {
            assert_malformed(&with_headers(&nested(depth, kind)), "deep");
        }
        let (_, malformed) = read(&with_headers(&nested(MAX_DEPTH, kind)));
        assert_eq!(malformed, None);
    }
}

#[test]
fn headers_of_too_many_values_make_the_message_malformed() {
    let array = |element: &[u8]| {
        let elements = element.repeat(130_000 / element.len());
        with_headers(&entry("many", &[b"A", &long(&elements)[..]].concat()))
    };
    let table = [b"F", &long(&entry("", b"V"))[..]].concat();
    for element in [b"V", &b"A\0\0\0\x01V"[..], &table, b"t\x01", b"s\0\0"] {
        assert_malformed(&array(element), "memory");
    }
    let names = (0..30_000_u16).map(|n| entry(n.to_string(), b"V"));
    assert_malformed(
        &with_headers(&names.take(16_000).collect::<Vec<_>>().concat()),
        "memory",
    );
}

/// As a sink of ours writes attributes.
#[test]
fn headers_of_texts_are_never_too_many() {
    let empty = [b"S", &long(b"")[..]].concat();
    for width in 1..=4_usize {
        let names = (0..10_usize.pow(u32::try_from(width).unwrap()))
            .map(|n| entry(format!("{n:0>width$}"), &empty));
        let table = names.collect::<Vec<_>>().concat();
        let input = with_headers(&table);
        assert_eq!(filtered(&input), input, "names of {width} digits");
    }
}

#[test]
fn headers_that_are_not_in_a_form_of_amqp_make_the_message_malformed() {
    assert_malformed(&with_headers(&entry([0xff], b"V")), "hex:ff");
    let inner = entry([0xfe], b"V");
    let inner = entry("t", &[b"F", &long(&inner)[..]].concat());
    assert_malformed(&with_headers(&inner), "hex:fe");
    assert_malformed(&with_headers(&entry("k", b"?")), "0x3f");
    for cut in [
        entry("k", b"I\0\0\0"),
        entry("k", b"S\0\0\0\x02x"),
        entry("k", b"F\0\0\0\x09\x01"),
        entry("k", b"A\xff\xff\xff\xffV"),
        entry("k", b""),
        b"\x09k".to_vec(),
    ] {
        assert_malformed(&with_headers(&cut), "longer than");
    }
}

#[test]
fn properties_that_are_not_all_there_make_the_message_malformed() {
    let cut = [short("the id"), vec![0; 7]].concat();
    assert_malformed(&content(MESSAGE_ID | 1 << 6, &cut), "longer than");
    let more = [short("the id"), b"?".to_vec()].concat();
    assert_malformed(&content(MESSAGE_ID, &more), "does not know");
    assert_malformed(&content(MESSAGE_ID | 1, &short("the id")), "does not know");
    // A table that says it is longer than the frame: what comes after it cannot be told from it.
    let (_, malformed) = read(&content(
        HEADERS | MESSAGE_ID,
        b"\xff\xff\xff\xff\x06the id",
    ));
    assert!(malformed.unwrap().contains("longer than"));
}

#[test]
fn what_could_not_be_read_is_shown_in_part() {
    let (message, _) = read(&with_headers(&entry("k", b"?")));
    let shown = message.attributes.get("amqp-unreadable-headers");
    assert_eq!(shown, Some("hex:016b3f"));
    assert_eq!(message.attributes.iter().count(), 1);
    let (message, _) = read(&with_headers(&nested(10_000, b'F')));
    let shown = message.attributes.get("amqp-unreadable-headers").unwrap();
    assert!((4_000..5_000).contains(&shown.len()), "{}", shown.len());
}

/// The broker takes frames from producers that are eight bytes longer than it said, and adds headers of its own.
#[test]
fn properties_that_do_not_fit_into_a_frame_make_the_message_malformed() {
    let text = |length| {
        let value = vec![b'x'; length];
        with_headers(&entry("long", &[b"S", &long(&value)[..]].concat()))
    };
    let fixed = text(0).len();
    let longest = text(131_072 - fixed);
    assert_eq!(longest.len(), 131_072);
    assert_eq!(filtered(&longest), longest);
    for length in [131_072 - fixed + 1, 131_080 - fixed, 10_000_000] {
        assert_malformed(&text(length), "do not fit");
    }
}

#[test]
fn a_frame_that_grows_beyond_its_bound_loses_its_headers() {
    let value = vec![b'x'; 131_072 - 180];
    let table = entry("long", &[b"S", &long(&value)[..]].concat());
    let properties = [long(&table), short([0xff; 125]), short("the id")].concat();
    let frame = content(HEADERS | CORRELATION_ID | MESSAGE_ID, &properties);
    assert!(frame.len() <= 131_072);
    assert!(filtered(&frame).len() <= 131_072);
    assert_malformed(&frame, "not UTF-8");
}

#[test]
fn a_rewritten_frame_fits_into_the_smallest_frame() {
    let headers = nested(18_000, b'F');
    let text = short([0xff; 255]);
    let texts = [&text, &text, &long(&headers)[..], &[1, 2]].concat();
    let more = [
        text.repeat(3),
        short([0xff; 255]),
        vec![0; 8],
        text.repeat(4),
    ]
    .concat();
    let input = content(0xfffc, &[texts, more].concat());
    let mut output = Vec::new();
    Filter::default().read(&input, &mut output).unwrap();
    assert!(output.len() <= LEAST_FRAME_MAX, "{}", output.len());
    let (message, malformed) = headers::read(&properties(&output), Bytes::new(), None);
    assert!(malformed.is_some());
    assert_eq!(message.attributes.get("amqp-priority"), Some("2"));
    assert!(message.attributes.get("amqp-unreadable-headers").is_some());
}

#[test]
fn nobody_else_can_say_that_a_message_is_unreadable() {
    let reason = [b"S", &long(b"because I say so")[..]].concat();
    let forged = entry(UNREADABLE, &reason);
    let twice = [forged.clone(), entry("k", b"V"), forged.clone()].concat();
    let (message, malformed) = read(&with_headers(&twice));
    assert_eq!(malformed, None);
    let attributes: Vec<_> = message.attributes.iter().collect();
    assert_eq!(
        attributes,
        [("X-onlyonce-unreadable", "because I say so"), ("k", "")]
    );
    // Within a table it is a name like any other.
    let inner = with_headers(&entry("t", &[b"F", &long(&forged)[..]].concat()));
    assert_eq!(filtered(&inner), inner);
}

#[test]
fn a_delayed_copy_stays_malformed() {
    let frame = filtered(&with_headers(&nested(1_000, b'F')));
    let packed = headers::Packed::of(properties(&frame));
    let copy = headers::Packed::of(headers::copy(&packed.unpack().unwrap(), 3, None));
    let headers::Packed::Wire(copy) = copy else {
        panic!("it is not packed");
    };
    let (flags, copy) = copy.split_at(2);
    let flags = u16::from_be_bytes(flags.try_into().unwrap());
    assert_malformed(&content(flags, copy), "deep");
}

#[test]
fn a_routing_key_that_is_not_utf8_becomes_hexadecimal() {
    let returned = |key: &[u8]| {
        let payload = [
            &[0, 60, 0, 50, 1, 0x38][..],
            &short("NO_ROUTE"),
            &short("e"),
            &short(key),
        ];
        frame(METHOD, &payload.concat())
    };
    let got = |key: &[u8]| {
        let payload = [
            &[0, 60, 0, 71][..],
            &[0; 9],
            &short("e"),
            &short(key),
            &[0, 0, 0, 7],
        ];
        frame(METHOD, &payload.concat())
    };
    let long = format!("hex:{}…", "ff".repeat(124));
    for (key, shown) in [(&[0xff, 0x41][..], "hex:ff41"), (&[0xff; 255], &long)] {
        let shown = shown.as_bytes();
        assert_eq!(filtered(&deliver(key)), deliver(shown));
        assert_eq!(filtered(&returned(key)), returned(shown));
        assert_eq!(filtered(&got(key)), got(shown));
    }
}

/// The broker cuts its explanation to 255 bytes, in the middle of a character as well.
#[test]
fn an_explanation_cut_within_a_character_is_shown() {
    for (class, method) in [(10, 50), (20, 40)] {
        let close = |text: &[u8]| {
            let payload = [&[0, class, 0, method, 1, 0x94][..], &short(text), &[0; 4]];
            frame(METHOD, &payload.concat())
        };
        let cut = &"no queue 'ü".as_bytes()[..11];
        let shown = "hex:6e6f207175657565202".to_owned() + "7c3";
        assert_eq!(filtered(&close(cut)), close(shown.as_bytes()));
    }
}

#[test]
fn what_is_not_amqp_is_a_clear_error() {
    let mut unending = content(0, b"");
    *unending.last_mut().unwrap() = 0;
    assert!(refused(&unending).contains("longer than it says"));
    let mut unending = frame(BODY, b"x");
    *unending.last_mut().unwrap() = 0;
    assert!(refused(&unending).contains("longer than it says"));
    for kind in [METHOD, HEADER, BODY, HEARTBEAT] {
        let huge = [&[kind, 0, 1][..], &[0xff; 4]].concat();
        assert!(refused(&huge).contains("4294967295 bytes"));
    }
    assert!(refused(&frame(4, b"")).contains("unknown type 4"));
    assert!(refused(&frame(HEADER, &[0; 13])).contains("13 bytes"));
    assert!(refused(&frame(HEADER, b"")).contains("0 bytes"));
}

#[test]
fn a_server_of_another_version_is_heard() {
    let mut output = Vec::new();
    Filter::default()
        .read(b"AMQP\x01\x01\0\x09whatever", &mut output)
        .unwrap();
    assert_eq!(output, b"AMQP\x01\x01\0\x09whatever");
}

#[test]
fn the_version_is_what_the_broker_says() {
    for (version, expected) in [
        ("4.0.5", Some((4, 0))),
        ("3.10.8", Some((3, 10))),
        ("4.3.0-rc.1", Some((4, 3))),
        ("5.1+build", Some((5, 1))),
        ("unknown", None),
        ("", None),
    ] {
        let broker = Arc::new(Broker::default());
        let mut filter = Filter::new(Arc::clone(&broker));
        filter.read(&start(version), &mut Vec::new()).unwrap();
        assert_eq!(broker.version(), expected, "{version}");
    }
}

/// The longest table of one header, an array of these elements, that passes.
fn longest_array(element: &[u8]) -> Vec<u8> {
    let array = |n: usize| entry("k", &[b"A", &long(&element.repeat(n))[..]].concat());
    let passes = |n: &usize| table::check(&array(*n)).is_ok();
    let most = 130_000 / element.len();
    let (mut low, mut high) = (0, most);
    while low < high {
        let middle = (low + high).div_ceil(2);
        match passes(&middle) {
            true => low = middle,
            false => high = middle - 1,
        }
    }
    array(low)
}

/// Headers that pass take no more than is said, as values and as attributes.
#[test]
fn headers_take_no_more_memory_than_is_said() {
    let of_one = [b"F", &long(&entry("", b"V"))[..]].concat();
    let of_names = [
        b"F",
        &long(&[entry("ab", b"V"), entry("cd", b"V")].concat())[..],
    ]
    .concat();
    let empty = [b"S", &long(b"")[..]].concat();
    let control = [b"S", &long(&[1; 1_000])[..]].concat();
    let double = [&b"d"[..], &1e-308_f64.to_be_bytes()].concat();
    let mut tables: Vec<_> = [
        b"V",
        &b"t\x01"[..],
        b"A\0\0\0\0",
        b"A\0\0\0\x01V",
        b"F\0\0\0\0",
        b"S\0\0\0\x01x",
        b"x\0\0\0\x01\xff",
        &of_one,
        &of_names,
        &control,
        &double,
    ]
    .into_iter()
    .map(longest_array)
    .collect();
    // In an order in which a B-tree is filled badly, and in one in which it is not.
    for step in [1, 7_919] {
        let names = (0..9_000).map(|n| entry(format!("{:04}", n * step % 10_000), &empty));
        tables.push(names.collect::<Vec<_>>().concat());
    }
    tables.push(nested(MAX_DEPTH, b'F'));
    for table in tables {
        let shown = String::from_utf8_lossy(&table[..20.min(table.len())]).into_owned();
        assert!(table::check(&table).is_ok(), "{shown}");
        let most = u64::try_from(SLACK + FACTOR * table.len()).unwrap();
        let bytes = long(&table);
        let mut parsed = None;
        let taken = allocation_counter::measure(|| parsed = Some(parse_field_table(&bytes[..])));
        let taken = u64::try_from(taken.bytes_current).unwrap();
        assert!(taken <= most, "{shown}: {taken} of {most} as values");
        let (_, headers) = parsed.unwrap().unwrap();
        let properties = BasicProperties::default().with_headers(headers);
        let mut message = None;
        let taken = allocation_counter::measure(|| {
            message = Some(headers::read(&properties, Bytes::new(), None));
        });
        let taken = u64::try_from(taken.bytes_current).unwrap();
        assert!(taken <= most, "{shown}: {taken} of {most} as attributes");
        assert_eq!(message.unwrap().1, None);
    }
}

fn random_value(random: &mut Rng, depth: usize, output: &mut Vec<u8>) {
    let kind = *random.choice(b"tbBsUuIilLfdDSxTVFAVFA?").unwrap();
    output.push(kind);
    let mut inner = Vec::new();
    match kind {
        b'F' | b'A' if depth > 0 => {
            for _ in 0..random.usize(..5) {
                if kind == b'F' {
                    inner.extend(short(random_text(random)));
                }
                random_value(random, depth - 1, &mut inner);
            }
            output.extend(long(&inner));
        }
        b'S' | b'x' | b'F' | b'A' => output.extend(long(&random_text(random))),
        b'V' => {}
        b'D' => output.extend([0; 5]),
        b't' | b'b' | b'B' => output.push(1),
        b's' | b'U' | b'u' => output.extend([0; 2]),
        b'I' | b'i' | b'f' => output.extend([0x7f; 4]),
        _ => output.extend([0x7f; 8]),
    }
}

fn random_text(random: &mut Rng) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..random.usize(..20)).map(|_| random.u8(..)).collect();
    if random.u8(..10) > 0 {
        bytes.iter_mut().for_each(|byte| *byte &= 0x7f);
    }
    bytes
}

/// Some seeds make headers that pass and some make others: both are asserted on.
#[test]
fn the_client_can_parse_whatever_comes_out() {
    let (mut passed, mut changed) = (0, 0);
    for seed in 0..3_000 {
        let mut random = Rng::with_seed(seed);
        let mut table = Vec::new();
        for _ in 0..random.usize(..6) {
            table.extend(short(random_text(&mut random)));
            random_value(&mut random, 4, &mut table);
        }
        let mut input = with_headers(&table);
        if random.u8(..4) == 0 {
            let at = random.usize(HEAD..input.len() - 1);
            input[at] = random.u8(..);
        }
        let output = filtered(&input);
        let (message, malformed) = headers::read(&properties(&output), Bytes::new(), None);
        match output == input {
            true => passed += 1,
            false => changed += 1,
        }
        let written = headers::write(&message, None);
        assert!(written.is_ok(), "seed {seed}: {written:?}");
        if malformed.is_none() {
            assert_eq!(filtered(&output), output, "seed {seed}");
        }
    }
    assert!(passed > 300 && changed > 300, "{passed} and {changed}");
}

/// What the reader of the client reads, until an end or an error.
fn read_all(mut stream: stream::Filtered<Pieces>) -> (Vec<u8>, Option<String>) {
    let (mut all, mut buffer) = (Vec::new(), [0; 10]);
    loop {
        let read = poll_fn(|context| {
            futures_io::AsyncRead::poll_read(Pin::new(&mut stream), context, &mut buffer)
        });
        match read.now_or_never().unwrap() {
            Ok(0) => return (all, None),
            Ok(many) => all.extend_from_slice(&buffer[..many]),
            Err(error) => return (all, Some(error.to_string())),
        }
    }
}

/// A socket that has this number of bytes at a time.
struct Pieces(Vec<u8>, usize);

impl futures_io::AsyncRead for Pieces {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let many = self.1.min(self.0.len()).min(buffer.len());
        let piece: Vec<_> = self.0.drain(..many).collect();
        buffer[..many].copy_from_slice(&piece);
        Poll::Ready(Ok(many))
    }
}

#[test]
fn a_stream_gives_what_the_filter_makes_and_then_its_error() {
    let input = [tune(131_072), harmless(), deliver(&[0xff])].concat();
    let expected = filtered(&input);
    let cut = [&input[..], &frame(9, b"")].concat();
    for size in [1, 7, 100_000] {
        let stream = |bytes: &[u8]| {
            let pieces = Pieces(bytes.to_vec(), size);
            read_all(stream::Filtered::new(pieces, &Arc::default()))
        };
        assert_eq!(stream(&input), (expected.clone(), None));
        // The end in the middle of a frame is for the client to see.
        assert_eq!(stream(&input[..input.len() - 1]).1, None);
        let (before, error) = stream(&cut);
        assert_eq!(before, expected);
        assert!(error.unwrap().contains("unknown type 9"));
    }
}
