// Small parts of the page: the buttons of types and the die.

// The colours that people expect of well-known types, in degrees of OKLCH; any other gets one from its letters.
const HUES = {
  fire: 35, water: 258, grass: 138, electric: 95, psychic: 310, ice: 210, dragon: 168, flying: 62, dark: 290,
  fairy: 355, normal: 80, fighting: 25, poison: 320, ground: 72, rock: 85, bug: 120, ghost: 300, steel: 250,
};
const GREYISH = ["dark", "normal", "steel", "rock"];

/** Return a button in the colour of a type. */
export function typeButton(name, onClick) {
  const button = document.createElement("button");
  Object.assign(button, { type: "button", textContent: name });
  button.dataset.type = name;
  let hash = 0;
  for (const letter of name) hash = (Math.imul(hash, 31) + letter.codePointAt(0)) >>> 0;
  button.style.setProperty("--hue", HUES[name.toLowerCase()] ?? hash % 360);
  button.style.setProperty("--chroma", GREYISH.includes(name.toLowerCase()) ? 0.03 : 0.12);
  button.addEventListener("click", onClick);
  return button;
}

/** Return a die that shows five, as an SVG element. */
export function dieIcon() {
  const draw = (kind, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", kind);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const icon = draw("svg", { viewBox: "0 0 24 24", "aria-hidden": "true" });
  icon.append(draw("rect", { x: 4, y: 4, width: 16, height: 16, rx: 4, fill: "none", stroke: "currentColor",
                             "stroke-width": 1.8 }));
  for (const [cx, cy] of [[8.5, 8.5], [15.5, 8.5], [12, 12], [8.5, 15.5], [15.5, 15.5]]) {
    icon.append(draw("circle", { cx, cy, r: 1.5 }));
  }
  return icon;
}
