"""The ledger's worker as a child process, and its tables: what the chaos tests share."""

import glob
import json
import os
import signal
import sqlite3
import subprocess
import threading
import time


def until(what, ready, seconds=120, pause=0.01):
    """Polls `ready` until it gives something true, and returns that."""
    deadline = time.monotonic() + seconds
    while True:
        found = ready()
        if found:
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited in vain for {what}")
        time.sleep(pause)


class Book:
    """The ledger's file, read without the program under test."""

    def __init__(self, folder):
        self.path = os.path.join(folder, "ledger.db")
        self.url = f"sqlite:{self.path}"

    def _query(self, sql):
        with sqlite3.connect(self.path, timeout=30) as db:
            return db.execute(sql).fetchall()

    def entries(self):
        """How many entries there are; they are never deleted, so the last row's number tells."""
        if not os.path.exists(self.path):
            return 0
        try:
            return self._query("SELECT IFNULL(MAX(rowid), 0) FROM entries")[0][0]
        except sqlite3.OperationalError:
            return 0  # No tables yet.

    def transfers(self):
        """Each transfer's entries, as accounts with amounts, in the order in which they were made."""
        transfers = {}
        for transfer, *entry in self._query("SELECT transfer_id, account, amount FROM entries ORDER BY rowid"):
            transfers.setdefault(transfer, []).append(tuple(entry))
        return transfers

    def order(self):
        """The transfers in the order in which they were applied, each as often as it was."""
        return [transfer for (transfer,) in self._query("SELECT transfer_id FROM entries ORDER BY rowid")]

    def sum_of_balances(self):
        return self._query("SELECT IFNULL(SUM(balance), 0) FROM balances")[0][0]

    def repeated_calls(self):
        """Keys with which more than one worker called the bank."""
        sql = "SELECT COUNT(*) FROM (SELECT key FROM calls GROUP BY key HAVING COUNT(DISTINCT worker) > 1)"
        return self._query(sql)[0][0]

    def can_be_written(self):
        """Whether nobody holds the write lock; a process that is stopped while it does keeps it."""
        db = sqlite3.connect(self.path, timeout=0.05, isolation_level=None)
        try:
            db.execute("BEGIN IMMEDIATE")
            db.execute("ROLLBACK")
            return True
        except sqlite3.OperationalError:
            return False
        finally:
            db.close()


class Worker:
    """A `ledger work` process; what it prints is followed."""

    def __init__(self, program, source, book, dead_letter, log, *more):
        arguments = ["work", "--source", source, "--store", book.url, "--dead-letter", dead_letter]
        arguments += ["--claim-lease", "2", "--report-every", "0.05", "--log", "info", *more]
        self.source, self.log = source, log
        with open(log, "w", encoding="utf-8") as stderr:
            self.process = subprocess.Popen([program, *arguments], stdout=subprocess.PIPE, stderr=stderr, text=True)
        self.figures = {}
        self._reader = threading.Thread(target=self._follow, daemon=True)
        self._reader.start()

    def _follow(self):
        for line in self.process.stdout:
            try:
                self.figures = json.loads(line)
            except ValueError:
                pass  # The last line of a killed process may be cut.

    def count(self, name):
        return self.figures.get(name, 0)

    def ended(self):
        return self.process.poll() is not None

    def signal(self, number):
        self.process.send_signal(number)

    def freeze(self):
        """Stops it, and waits until all its threads stand still: one that is in a system call when the signal is sent still ends
        that call, and may take a lock with it."""
        self.signal(signal.SIGSTOP)
        until("all threads to stand still", lambda: all(state == "T" for state in self._states()))

    def _states(self):
        for path in glob.glob(f"/proc/{self.process.pid}/task/*/stat"):
            with open(path, encoding="utf-8") as stat:
                # The name before it may have any character.
                yield stat.read().rpartition(")")[2].split()[0]

    def kill(self):
        """Ends it, and tells whether there was something to end."""
        self.signal(signal.SIGKILL)
        code = self.process.wait()
        self._reader.join()
        return code == -signal.SIGKILL

    def stop(self):
        """Has it finish what runs, and waits for a good end."""
        self.signal(signal.SIGTERM)
        return self.report()

    def report(self, seconds=60):
        """Waits for a good end."""
        try:
            code = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"a worker did not end within {seconds} s") from error
        self._reader.join()
        if code != 0:
            raise AssertionError(f"a worker ended with {code}; its log ends:\n{self.last_words()}")
        return self.figures

    def last_words(self, lines=15):
        with open(self.log, encoding="utf-8") as log:
            return "".join(log.readlines()[-lines:])


def transfer(number, rng):
    """A transfer's id and payload."""
    identity = f"transfer-{number}"
    source, target = rng.sample(range(1_000), 2)
    body = {"transfer_id": identity, "from": f"account-{source}", "to": f"account-{target}"}
    body["amount"] = rng.randint(1, 99_999)
    return identity, json.dumps(body)


def entries(body):
    """What a transfer's payload must become."""
    asked = json.loads(body)
    return [(asked["from"], -asked["amount"]), (asked["to"], asked["amount"])]


def check_tables(book, program, sent):
    """Compares the tables with what was sent, the transfers' payloads by id; returns findings and the program's own audit."""
    booked = book.transfers()
    expected = {identity: entries(body) for identity, body in sent.items()}
    findings = {
        "lost": len(expected.keys() - booked.keys()),
        "applied_twice": sum(len(found) > 2 for found in booked.values()),
        "half_applied": sum(len(found) < 2 for found in booked.values()),
        "not_as_sent": sum(
            found != expected[identity] for identity, found in booked.items() if identity in expected and len(found) == 2
        ),
        "never_sent": len(booked.keys() - expected.keys()),
        "sum_of_balances": book.sum_of_balances(),
    }
    command = [program, "audit", "--store", book.url, "--transfers", str(len(sent))]
    audit = subprocess.run(command, capture_output=True, text=True, check=False)
    findings["audit_disagrees"] = int(audit.returncode != 0)
    return findings, json.loads(audit.stdout)
