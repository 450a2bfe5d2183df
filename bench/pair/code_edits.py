"""Ten prompts that ask for a small edit of a file: most of the answer repeats the prompt."""

_EDITS = (
    (
        "Rename the function `total` to `order_total` in this file.",
        '''
from dataclasses import dataclass


@dataclass
class Line:
    name: str
    price: int
    count: int = 1


def total(lines):
    """The sum of all lines in cents."""
    return sum(line.price * line.count for line in lines)


def discount(lines, share):
    """What a customer saves with a discount of this share."""
    return round(total(lines) * share)


def invoice(lines, share=0.0):
    """The lines of an invoice, with the amount due at its end."""
    rows = [f"{line.count} x {line.name}: {line.price / 100:.2f}" for line in lines]
    due = total(lines) - discount(lines, share)
    return [*rows, f"due: {due / 100:.2f}"]


if __name__ == "__main__":
    basket = [Line("bread", 320), Line("milk", 119, 2)]
    print(total(basket))
    print("\\n".join(invoice(basket, 0.1)))
''',
    ),
    (
        "Rename the variable `buf` to `samples` everywhere in this file.",
        """
#include <stdio.h>
#include <stdlib.h>

static double mean(const double *buf, size_t count)
{
    double sum = 0;
    for (size_t i = 0; i < count; i++)
        sum += buf[i];
    return count ? sum / count : 0;
}

static double largest(const double *buf, size_t count)
{
    double best = buf[0];
    for (size_t i = 1; i < count; i++)
        if (buf[i] > best)
            best = buf[i];
    return best;
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: %s NUMBER...\\n", argv[0]);
        return 1;
    }
    size_t count = argc - 1;
    double *buf = malloc(count * sizeof *buf);
    for (size_t i = 0; i < count; i++)
        buf[i] = atof(argv[i + 1]);
    printf("mean %g, largest %g\\n", mean(buf, count), largest(buf, count));
    free(buf);
    return 0;
}
""",
    ),
    (
        "Add type annotations to the parameters and results of all functions in this file. Change nothing else.",
        '''
import csv
from collections import Counter


def read_rows(path):
    """The rows of a CSV file as dictionaries."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def count_by(rows, column):
    """How often each value of a column occurs."""
    return Counter(row[column] for row in rows)


def most_common(rows, column, most):
    """The most frequent values of a column, the most frequent first."""
    return [value for value, _ in count_by(rows, column).most_common(most)]


def without(rows, column, value):
    """The rows with another value in a column."""
    return [row for row in rows if row[column] != value]


def print_report(path, column, most=5):
    """Print the most frequent values and how many rows have them."""
    rows = read_rows(path)
    counts = count_by(rows, column)
    for value in most_common(rows, column, most):
        print(f"{value}: {counts[value]} of {len(rows)}")
''',
    ),
    (
        "Rename the class `Queue` to `JobQueue` in this file.",
        """
class QueueFull extends Error {}

export class Queue {
  constructor(limit = 16) {
    this.limit = limit;
    this.jobs = [];
    this.waiting = [];
  }

  get length() {
    return this.jobs.length;
  }

  put(job) {
    if (this.jobs.length >= this.limit) {
      throw new QueueFull(`a Queue holds at most ${this.limit} jobs`);
    }
    const next = this.waiting.shift();
    if (next) next(job);
    else this.jobs.push(job);
  }

  async get() {
    if (this.jobs.length > 0) return this.jobs.shift();
    return new Promise((resolve) => this.waiting.push(resolve));
  }

  static of(...jobs) {
    const queue = new Queue(jobs.length);
    for (const job of jobs) queue.put(job);
    return queue;
  }
}

const queue = Queue.of("a", "b");
console.log(queue.length, await queue.get());
""",
    ),
    (
        "Replace every use of `print` in this file with `logger.info`, and create the logger at the top.",
        '''
import shutil
import sys
from pathlib import Path


def copy_tree(source, target):
    """Copy all files below a folder that the target does not have."""
    copied = 0
    for path in sorted(source.rglob("*")):
        if not path.is_file():
            continue
        destination = target / path.relative_to(source)
        if destination.exists():
            print(f"kept {destination}")
            continue
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, destination)
        print(f"copied {path} to {destination}")
        copied += 1
    return copied


def main():
    source, target = map(Path, sys.argv[1:3])
    if not source.is_dir():
        print(f"{source} is not a folder")
        return 1
    print(f"{copy_tree(source, target)} files copied")
    return 0


if __name__ == "__main__":
    sys.exit(main())
''',
    ),
    (
        "In this file, rename the field `addr` to `address`.",
        """
package main

import (
	"fmt"
	"net"
	"time"
)

type probe struct {
	addr    string
	timeout time.Duration
	tries   int
}

func (p probe) once() (time.Duration, error) {
	began := time.Now()
	conn, err := net.DialTimeout("tcp", p.addr, p.timeout)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", p.addr, err)
	}
	defer conn.Close()
	return time.Since(began), nil
}

func (p probe) best() (time.Duration, error) {
	best := p.timeout
	for i := 0; i < p.tries; i++ {
		took, err := p.once()
		if err != nil {
			return 0, err
		}
		if took < best {
			best = took
		}
	}
	return best, nil
}

func main() {
	p := probe{addr: "127.0.0.1:8080", timeout: time.Second, tries: 3}
	took, err := p.best()
	fmt.Println(p.addr, took, err)
}
""",
    ),
    (
        "Change the table name `user` to `account` in all statements of this file.",
        """
CREATE TABLE user (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    email TEXT NOT NULL UNIQUE,
    created_at TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP
);

CREATE TABLE message (
    id INTEGER PRIMARY KEY,
    user_id INTEGER NOT NULL REFERENCES user (id) ON DELETE CASCADE,
    text TEXT NOT NULL,
    sent_at TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP
);

CREATE INDEX message_by_user ON message (user_id, sent_at);

INSERT INTO user (name, email) VALUES ('Ada', 'ada@example.org');
INSERT INTO user (name, email) VALUES ('Grace', 'grace@example.org');

SELECT user.name, count(message.id) AS messages
FROM user
LEFT JOIN message ON message.user_id = user.id
GROUP BY user.id
ORDER BY messages DESC;

DELETE FROM user WHERE id NOT IN (SELECT user_id FROM message);
""",
    ),
    (
        "The method `push` should raise ValueError where the value is None. Show the whole file with this change.",
        '''
class Heap:
    """A binary heap: the smallest value first."""

    def __init__(self):
        self.values = []

    def __len__(self):
        return len(self.values)

    def push(self, value):
        """Add a value."""
        self.values.append(value)
        index = len(self.values) - 1
        while index > 0:
            parent = (index - 1) // 2
            if self.values[parent] <= self.values[index]:
                break
            self._swap(parent, index)
            index = parent

    def pop(self):
        """Remove and return the smallest value."""
        if not self.values:
            raise IndexError("the heap is empty")
        self._swap(0, len(self.values) - 1)
        smallest = self.values.pop()
        index = 0
        while (child := 2 * index + 1) < len(self.values):
            if child + 1 < len(self.values) and self.values[child + 1] < self.values[child]:
                child += 1
            if self.values[index] <= self.values[child]:
                break
            self._swap(index, child)
            index = child
        return smallest

    def _swap(self, one, other):
        self.values[one], self.values[other] = self.values[other], self.values[one]
''',
    ),
    (
        "Rename the parameter `n` of all functions in this file to `count`.",
        """
pub fn fibonacci(n: usize) -> Vec<u64> {
    let mut numbers = Vec::with_capacity(n);
    let (mut one, mut other) = (0, 1);
    for _ in 0..n {
        numbers.push(one);
        (one, other) = (other, one + other);
    }
    numbers
}

pub fn primes(n: usize) -> Vec<u64> {
    let mut found: Vec<u64> = Vec::with_capacity(n);
    let mut candidate = 2;
    while found.len() < n {
        if found.iter().all(|prime| candidate % prime != 0) {
            found.push(candidate);
        }
        candidate += 1;
    }
    found
}

pub fn squares(n: usize) -> impl Iterator<Item = u64> {
    (1..=n as u64).map(|number| number * number)
}

fn main() {
    println!("{:?}", fibonacci(10));
    println!("{:?}", primes(10));
    println!("{:?}", squares(10).collect::<Vec<_>>());
}
""",
    ),
    (
        "Change the port from 8080 to 9090 everywhere in this file.",
        """
services:
  gateway:
    image: example/gateway:2.1
    command: ["--listen", "0.0.0.0:8080", "--backend", "http://backend:8000"]
    ports:
      - "8080:8080"
    environment:
      PUBLIC_URL: "http://localhost:8080"
      LOG_LEVEL: "info"
    healthcheck:
      test: ["CMD", "curl", "--fail", "http://localhost:8080/healthz"]
      interval: 10s
      timeout: 2s
      retries: 5
    depends_on:
      - backend
  backend:
    image: example/backend:2.1
    command: ["--listen", "0.0.0.0:8000"]
    environment:
      GATEWAY_URL: "http://gateway:8080"
      LOG_LEVEL: "info"
    healthcheck:
      test: ["CMD", "curl", "--fail", "http://localhost:8000/healthz"]
      interval: 10s
      timeout: 2s
      retries: 5
""",
    ),
)

CODE_EDITS = tuple(f"{task} Answer with the whole file alone.\n\n```{code}```" for task, code in _EDITS)
