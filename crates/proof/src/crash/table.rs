//! What the command prints.
#![expect(clippy::print_stdout, reason = "the command's output")]

use std::collections::BTreeSet;
use std::time::Duration;

use super::hunt::{Bag, Hunt};

pub fn heading(hunts: &[Hunt]) {
    for hunt in hunts {
        println!(
            "{}: at least {} kills, seed {}",
            hunt.name, hunt.kills, hunt.seed
        );
    }
    println!();
}

/// Point by point, how many workers died there.
pub fn points(bags: &[Bag]) {
    let points: BTreeSet<&String> = bags.iter().flat_map(|bag| bag.kills.keys()).collect();
    print!("{:<44}", "killed");
    bags.iter().for_each(|bag| print!("{:>22}", bag.name));
    println!();
    for point in points {
        print!("{point:<44}");
        for bag in bags {
            let kills = bag.kills.get(point).map_or("-".into(), u64::to_string);
            print!("{kills:>22}");
        }
        println!();
    }
}

pub fn audits(bags: &[Bag]) {
    for bag in bags {
        let kills: u64 = bag.kills.values().sum();
        println!(
            "\n{}: {kills} kills at {} points in {:.1} s; {} transfers, {} sent twice, {} poison",
            bag.name,
            bag.kills.len(),
            bag.took.as_secs_f64(),
            bag.sent - bag.poison,
            bag.duplicates,
            bag.poison
        );
        match bag.audit.is_sound() {
            true => println!("  as it should be: {} applied once", bag.audit.applied),
            false => println!("  NOT as it should be: {:?}", bag.audit),
        }
        if bag.audit.published > 0 {
            println!("  {} published through the outbox", bag.audit.published);
        }
        if bag.audit.repeated_calls > 0 {
            println!(
                "  the downstream service was asked {} times again, with the same key",
                bag.audit.repeated_calls
            );
        }
        for (point, passes) in &bag.missed {
            println!("  not reached: {point} (passed {passes} times in the dry run)");
        }
    }
}

pub fn summary(bags: &[Bag], took: Duration) {
    let sum = |of: fn(&Bag) -> u64| bags.iter().map(of).sum::<u64>();
    println!(
        "\ncrash: {} kills at {} points, {} transfers, {} applied once, {} twice, {} lost, {:.1} s",
        sum(|bag| bag.kills.values().sum()),
        sum(|bag| bag.kills.len() as u64),
        sum(|bag| bag.sent - bag.poison),
        sum(|bag| bag.audit.applied),
        sum(|bag| bag.audit.twice),
        sum(|bag| bag.audit.lost),
        took.as_secs_f64()
    );
}
