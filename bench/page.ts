// The page of a report: its style for light and dark, the filter of operations, and the script.
import { escaped } from './plot.js'

const style = `
:root { color-scheme: light dark; --ground: #fff; --text: #1b2126; --soft: #5c6770; --line: #dfe3e6; --raised: #f5f7f8;
  --own: #0b6e99; --peer: #8b959c; --good: #16703c; --bad: #b02a1a; --goodback: #e2f3e8; --badback: #fbe6e2;
  --strength: 65%; --light: 40%; --s1: #c8553d; --s2: #6b7d2f; --s3: #8d6aa8; --s4: #b07a10; --s5: #5f6b73; }
@media (prefers-color-scheme: dark) { :root { --ground: #14181b; --text: #e4e8ea; --soft: #9aa5ac; --line: #2f373c;
  --raised: #1d2327; --own: #4db3dd; --peer: #7d8990; --good: #6fcf93; --bad: #f28b7a; --goodback: #16301f;
  --badback: #3b1d19; --strength: 60%; --light: 65%; --s1: #ee8a73; --s2: #aebf6c; --s3: #c0a0da; --s4: #e3b457;
  --s5: #a6b1b8; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--ground); max-width: 1180px;
  margin: 0 auto; padding: 1.2em 1em 4em; }
h1 { font-size: 1.5em; line-height: 1.25; margin: 0.4em 0; } h2 { font-size: 1.2em; margin: 2em 0 0.2em; }
h3 { font-size: 1em; margin: 1.2em 0 0.3em; }
p { max-width: 46em; margin: 0.3em 0 0.8em; } .about, p, figcaption { color: var(--soft); }
.filter { display: flex; flex-wrap: wrap; gap: 4px 6px; margin: 1em 0; font-size: 13px; }
.filter label, .filter button { display: inline-flex; align-items: center; gap: 5px; padding: 2px 9px; font: inherit;
  border: 1px solid var(--line); border-radius: 99px; background: var(--raised); color: inherit; cursor: pointer; }
.filter input { position: absolute; opacity: 0; pointer-events: none; }
.filter label:has(input:not(:checked)) { opacity: 0.45; text-decoration: line-through; }
:focus-visible, label:has(:focus-visible) { outline: 2px solid var(--own); outline-offset: 1px; }
.table, figure { overflow-x: auto; max-width: 100%; }
.table { border: 1px solid var(--line); border-radius: 8px; max-height: 75vh; overflow-y: auto; }
table { border-collapse: separate; border-spacing: 0; font-size: 13px; width: 100%; }
th, td { text-align: left; padding: 3px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; } tbody tr:hover { background: var(--raised); }
th { position: sticky; top: 0; z-index: 1; background: var(--raised); font-weight: 600; padding: 0; }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 5px 10px; width: 100%; cursor: pointer;
  text-align: inherit; }
th button::after { content: '\\2195'; opacity: 0.25; padding-left: 4px; }
th[aria-sort=ascending] button::after { content: '\\2191'; opacity: 1; }
th[aria-sort=descending] button::after { content: '\\2193'; opacity: 1; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
.own td:nth-child(3) { font-weight: 600; } .good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
.outcome { font-weight: 600; } .met .outcome { color: var(--good); background: var(--goodback); }
.missed .outcome { color: var(--bad); background: var(--badback); } .not-measured .outcome { color: var(--soft); }
.op { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 6px; background: var(--hue); }
.bar { position: relative; width: 100%; min-width: 170px; height: 12px; }
.bar b { position: absolute; top: 0; bottom: 0; border-radius: 2px; background: var(--own); min-width: 1px; }
.bar b.slow { background: var(--bad); }
.bar i { position: absolute; top: -3px; bottom: -3px; width: 1px; background: var(--text); }
pre { margin: 0; padding: 8px 12px; font-size: 12.5px; }
figure { margin: 0.6em 0; } figcaption { font-size: 13px; }
svg { display: block; font-size: 11px; } svg text { fill: var(--soft); } svg .axis { font-size: 12px; }
.grid { stroke: var(--line); } .frame { fill: none; stroke: var(--line); }
polyline { fill: none; stroke: var(--own); stroke-width: 1.6; stroke-linejoin: round; }
.roof polyline { stroke: var(--text); stroke-width: 1.4; } .roof.bf16 polyline { stroke-dasharray: 6 4; }
circle { fill: var(--own); stroke: var(--ground); stroke-width: 1; } .point circle { fill: var(--hue); }
.peer path { stroke: var(--peer); stroke-width: 1.6; fill: none; }
circle:hover, circle:focus { stroke: var(--text); stroke-width: 2; outline: none; } path:focus { outline: none; }
.panels { display: flex; flex-wrap: wrap; gap: 0 1.5em; } .panels figure { min-width: 0; }
.key { font-size: 13px; } .k { display: inline-block; vertical-align: middle; margin-left: 10px; }
.k:first-child { margin-left: 0; } .k.circle { width: 10px; height: 10px; border-radius: 50%; background: var(--own); }
.k.cross { color: var(--peer); font-weight: 700; } .k.roofline { width: 24px; border-top: 2px solid var(--text); }
.k.dashed { border-top-style: dashed; }
#tip { position: fixed; z-index: 9; pointer-events: none; white-space: pre-line; max-width: 320px; padding: 5px 9px;
  border-radius: 6px; background: var(--text); color: var(--ground); font-size: 12.5px; line-height: 1.4; }
@media (max-width: 600px) { body { padding: 0.6em 0.7em 3em; } td { padding: 3px 6px; } th button { padding: 5px 6px; } }
[hidden] { display: none !important; }
@media print { .table { max-height: none; overflow: visible; } .filter { display: none; } }
${[1, 2, 3, 4, 5].map((n) => `.series-${n} polyline { stroke: var(--s${n}); } .series-${n} circle { fill: var(--s${n}); } .k.series-${n} { background: var(--s${n}); }`).join('\n')}`

// Without it the page shows everything, in the order of measuring.
const script = `
const each = (selector, f, within = document) => within.querySelectorAll(selector).forEach(f)
each('th button', (button) => button.addEventListener('click', () => {
  const th = button.parentElement
  const at = th.cellIndex
  const down = th.getAttribute('aria-sort') === (th.matches('.n') ? 'descending' : 'ascending') ? -1 : 1
  const sign = th.matches('.n') ? -down : down
  each('th', (other) => other.removeAttribute('aria-sort'), th.parentElement)
  th.setAttribute('aria-sort', sign > 0 ? 'ascending' : 'descending')
  const body = th.closest('table').tBodies[0]
  const key = (row) => row.cells[at].dataset.value
  body.append(...[...body.rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)]
    if (x !== undefined && y !== undefined) return sign * (x - y)
    // Empty cells of numbers stay at the end.
    if (x !== undefined || y !== undefined) return x === undefined ? 1 : -1
    return sign * a.cells[at].textContent.localeCompare(b.cells[at].textContent, 'en', { numeric: true })
  }))
}))
const boxes = [...document.querySelectorAll('.filter input')]
const filter = () => {
  const on = new Set(boxes.filter((box) => box.checked).map((box) => box.value))
  each('[data-op]', (element) => element.toggleAttribute('hidden', !on.has(element.dataset.op)))
}
boxes.forEach((box) => box.addEventListener('change', filter))
each('.filter button', (button) => button.addEventListener('click', () => {
  boxes.forEach((box) => { box.checked = button.value === 'all' })
  filter()
}))
const tip = document.getElementById('tip')
const show = ({ target }) => {
  const of = target.closest?.('[data-tip]')
  tip.hidden = !of
  if (!of) return
  tip.textContent = of.dataset.tip
  const { left, bottom, top } = of.getBoundingClientRect()
  const { width, height } = tip.getBoundingClientRect()
  tip.style.left = Math.max(4, Math.min(left + 8, innerWidth - width - 4)) + 'px'
  tip.style.top = (bottom + height + 12 > innerHeight ? top - height - 8 : bottom + 8) + 'px'
}
for (const event of ['pointerover', 'focusin']) document.addEventListener(event, show)
document.addEventListener('scroll', () => { tip.hidden = true }, true)
// The tip replaces the browser's own, which serves where scripts do not run.
each('svg title', (title) => title.remove())
`

export interface Page {
  title: string
  about: readonly string[]
  /** A colour for each operation. */
  hues: ReadonlyMap<string, number>
  body: string
}

export function page({ title, about, hues, body }: Page): string {
  const colours = [...hues].map(
    ([op, hue]) =>
      `[data-hue="${escaped(op)}"], .hue-${hue} { --hue: hsl(${hue} var(--strength) var(--light)); }`,
  )
  const labels = [...hues.keys()].map(
    (op) =>
      `<label><input type="checkbox" value="${escaped(op)}" checked><span class="op" style="margin:0" data-hue="${escaped(op)}"></span>${escaped(op)}</label>`,
  )
  const filter =
    hues.size > 1
      ? `<div class="filter" role="group" aria-label="operations shown"><button type="button" value="all">all</button><button type="button" value="none">none</button>${labels.join('')}</div>`
      : ''
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>${escaped(title)}</title>
<link rel="icon" href="data:,">
<style>${style}
${colours.join('\n')}</style>
</head>
<body>
<h1>${escaped(title)}</h1>
<p class="about">${about.map(escaped).join('<br>')}</p>
${filter}
${body}
<div id="tip" role="tooltip" hidden></div>
<script>${script}</script>
</body>
</html>
`
}
