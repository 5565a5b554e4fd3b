// What the page says: beside its progress bar, in the box for trouble, and in the notes on a link.

const $ = (id) => document.getElementById(id);

/** Show a sentence, which a screen reader also reads out. */
export function say(sentence) {
  show(sentence);
  $("announcement").textContent = sentence;
}

/** Show what changes too often to be read out. */
export function show(sentence) {
  $("status").textContent = sentence;
}

/** Say what went wrong, with a button to try again; "" when all is well. */
export function trouble(sentence) {
  $("trouble-text").textContent = sentence;
  $("trouble").hidden = sentence === "";
}

export const inTrouble = () => !$("trouble").hidden;

/** Show notes, a paragraph each, in place of those before; none closes the box. */
export function note(sentences) {
  $("notes-text").replaceChildren(...sentences.map((sentence) => {
    const line = document.createElement("p");
    line.textContent = sentence;
    return line;
  }));
  $("notes").hidden = sentences.length === 0;
}
