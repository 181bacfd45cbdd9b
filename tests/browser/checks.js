// What the tests ask of an open page; each answer is a list of complaints, empty where all is well.
const said = (node) => `<${node.localName}> ${node.textContent.trim().slice(0, 60)}`;
const shown = (node) => node.checkVisibility({ checkVisibilityCSS: true });
const textNodes = () => {
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    if (node.data.trim() && node.parentElement.tagName !== "SCRIPT" && shown(node.parentElement)) found.push(node);
  }
  return found;
};

async function images() {
  const complaints = [];
  for (const image of document.images) {
    image.loading = "eager";
    await image.decode().catch(() => {});
    if (!image.naturalWidth) complaints.push(`${image.getAttribute("src")} does not load`);
    if (!image.alt.trim()) complaints.push(`${image.getAttribute("src")} has no alt text`);
  }
  return complaints;
}

// What can be clicked: by its kind, by its attributes or by the pointer's look over it.
function interactive() {
  const kinds = "a, button, input, select, textarea, summary, [tabindex], [onclick], [role=button]";
  const pointed = (node) => getComputedStyle(node).cursor === "pointer" && !node.closest(kinds);
  const clicked = (node) => node.matches(kinds) || pointed(node);
  return [...document.body.querySelectorAll("*")].filter((node) => shown(node) && clicked(node));
}

// Of the element that has the focus.
function ring() {
  const { outlineStyle, outlineWidth } = getComputedStyle(document.activeElement);
  return outlineStyle !== "none" && parseFloat(outlineWidth) >= 2;
}

function overflow(width) {
  const complaints = [];
  if (innerWidth !== width) complaints.push(`the page is laid out ${innerWidth} px wide`);
  const needed = document.documentElement.scrollWidth;
  if (needed > width) complaints.push(`the page is ${needed} px wide`);
  const scrolls = (node) =>
    node.scrollWidth > node.clientWidth && ["auto", "scroll"].includes(getComputedStyle(node).overflowX);
  for (const node of [...document.body.querySelectorAll("*")].filter(shown)) {
    if (scrolls(node) && (node.tabIndex < 0 || !node.role || !node.ariaLabel))
      complaints.push(`${said(node)} scrolls, and lacks a tabindex, a role or a label`);
    let within = node.parentElement;
    while (within && !scrolls(within)) within = within.parentElement;
    if (!within && node.getBoundingClientRect().right > width + 1) complaints.push(`${said(node)} is cut off`);
  }
  for (const node of textNodes()) {
    const size = parseFloat(getComputedStyle(node.parentElement).fontSize);
    if (size < 12) complaints.push(`${said(node.parentElement)} is ${size} px high`);
  }
  return complaints;
}

// By WCAG 2: (L1 + 0.05) / (L2 + 0.05) of the relative luminances.
const channels = (colour) => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d");
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data].map((value) => value / 255);
};
const over = ([r, g, b, a], below) => [r, g, b].map((value, at) => a * value + (1 - a) * below[at]);
const luminance = (colour) => {
  const linear = colour.map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
};
function background(node) {
  // Below everything lies the canvas in the scheme's own colour.
  if (!node) return channels("Canvas").slice(0, 3);
  return over(channels(getComputedStyle(node).backgroundColor), background(node.parentElement));
}

function contrast(scheme) {
  const complaints = [];
  if ((scheme === "dark") !== luminance(background(document.body)) < 0.2) complaints.push(`the page is not ${scheme}`);
  const check = (node, pseudo) => {
    const below = background(node);
    let [r, g, b, alpha] = channels(getComputedStyle(node, pseudo).color);
    for (let each = node; each; each = each.parentElement) alpha *= getComputedStyle(each).opacity;
    const [low, high] = [luminance(below), luminance(over([r, g, b, alpha], below))].sort((x, y) => x - y);
    const ratio = (high + 0.05) / (low + 0.05);
    if (!(ratio >= 4.5)) complaints.push(`${said(node)}${pseudo || ""}: ${ratio.toFixed(2)}`);
  };
  new Set(textNodes().map((node) => node.parentElement)).forEach((node) => check(node));
  for (const node of [...document.body.querySelectorAll("*")].filter(shown))
    for (const pseudo of ["::before", "::after"])
      if (!["none", "normal"].includes(getComputedStyle(node, pseudo).content)) check(node, pseudo);
  return complaints;
}
