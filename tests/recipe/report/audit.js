({
  /* What the keyboard should reach, in order; each is given its place. */
  reachable() {
    const all = document.querySelectorAll('a[href], button, select, input, summary, [tabindex="0"]');
    const seen = [...all].filter((e) => e.checkVisibility() && !e.disabled && e.getClientRects().length);
    return seen.map((e, k) => (e.dataset.k = k));
  },

  /* Elements beyond the right edge, but for those inside what scrolls by itself. */
  tooWide() {
    return [...document.querySelectorAll("main *, header *, footer *")]
      .filter((e) => !e.closest(".scrolling > *, .spoken, svg") && e.checkVisibility())
      .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5).map((e) => e.outerHTML.slice(0, 80));
  },

  /* [ratio, element] of everything with text of its own, by the formula of WCAG 2; then of what canvases write. */
  contrasts() {
    const parse = (text) => text.match(/[\d.]+/g).map(Number);
    const linear = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
    const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const ground = (e) => {
      const colour = parse(getComputedStyle(e).backgroundColor);
      return colour.length < 4 || colour[3] === 1 ? colour : ground(e.parentElement);
    };
    const found = [];
    for (const e of document.querySelectorAll("body *")) {
      const says = [...e.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
      if (!says || !e.checkVisibility() || e.closest("script, button:disabled")) continue;
      const style = getComputedStyle(e), text = e instanceof SVGElement ? style.fill : style.color;
      found.push([ratio(light(parse(text)), light(ground(e))), e.outerHTML.slice(0, 90)]);
    }
    const probe = document.body.appendChild(document.createElement("i"));
    const of = (name) => {
      probe.style.color = `var(${name})`;
      return light(parse(getComputedStyle(probe).color));
    };
    return [found, ["--ink", "--soft"].map((name) => ratio(of(name), of("--ground")))];
  },
})
