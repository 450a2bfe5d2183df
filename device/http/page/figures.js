// The figures of an answer, from the rounds so far.

const HALF_FLOAT_BYTES = 2;
const elements = new Map(
  [...document.querySelectorAll("[data-figure]")].map((element) => [element.dataset.figure, element]),
);

/** Sums over the rounds of one answer. */
export class Figures {
  constructor(vocabSize) {
    this.vocabSize = vocabSize;
    this.rounds = this.tokens = this.drafted = this.accepted = this.seconds = this.bytes = 0;
    this.draftedRounds = this.replySeconds = 0;
  }

  add(round) {
    this.rounds += 1;
    this.tokens += round.tokens.length;
    this.drafted += round.drafted;
    this.accepted += round.accepted;
    this.seconds += round.draft_seconds + round.reply_seconds;
    this.bytes += round.uplink_bytes;
    if (round.drafted) {
      this.draftedRounds += 1;
      this.replySeconds += round.reply_seconds;
    }
  }

  get speed() {
    return this.tokens / this.seconds;
  }

  /** Write the figures to the page; a dash where nothing was measured. */
  show() {
    const perToken = this.drafted / this.tokens;
    const full = this.drafted ? bytes(perToken * this.vocabSize * HALF_FLOAT_BYTES) : "";
    write("speed", number(this.speed, 1));
    write("acceptance", number(this.accepted / this.drafted, 2));
    write("tokensPerRound", number(this.tokens / this.rounds, 1));
    write("roundTrip", number((1000 * this.replySeconds) / this.draftedRounds, 0, " ms"));
    write("uplink", number(this.bytes / this.tokens, 1, " B"));
    write("fullVocabulary", full && `; with the full vocabulary ${full}`);
  }
}

function write(name, text) {
  elements.get(name).textContent = text;
}

function number(value, digits, unit = "") {
  return Number.isFinite(value) ? value.toFixed(digits) + unit : "–";
}

function bytes(count) {
  return count < 1000 ? `${count.toFixed(0)} B` : `${(count / 1000).toFixed(0)} kB`;
}
