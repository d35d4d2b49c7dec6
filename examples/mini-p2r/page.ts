/** The run as one self-contained HTML page: it has no script and requests nothing. */
import { BANDS, curveSvg, LINES } from './curve.js'
import { type ExampleImages, evidenceSvg, percent } from './pictures.js'
import { type Example, type Run, SCORES, systemsOf } from './report.js'
import { LATTICE } from './scene.js'
import { SETTINGS } from './train.js'

/** `images` are those of `run.examples`, in the same order. */
export async function page(run: Run, images: readonly ExampleImages[]): Promise<string> {
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Miniature Perceive-to-Reason, seed ${run.seed}</title>
<link rel="icon" href="data:,">
<style>${STYLE}</style>
</head>
<body>
<header>
<h1>One digit in a megapixel</h1>
<p>A miniature Perceive-to-Reason system. The <em>Perceiver</em> sees a 1024 × 1024 canvas reduced to
128 × 128 and names one of 1024 boxes. The <em>Reasoner</em> sees that box at full resolution, and
the whole canvas in four tokens, and answers.</p>
<p class="note">${summary(run)}</p>
</header>
<main>
<section class="results" aria-labelledby="scores">
<h2 id="scores">Scores</h2>
${scoresTable(run)}
<h2 id="curve">Learning curve</h2>
${await curveFigure(run)}
</section>
<section aria-labelledby="examples">
<h2 id="examples">Examples</h2>
${examplesList(run, images)}
</section>
</main>
<footer><p>The canvases hide MNIST digits among strokes and fragments of digits. The system knows digits
of this kind alone.</p></footer>
</body>
</html>
`
}

function summary({ seed, steps, phases, stopped, seconds, device }: Run): string {
  const full = SETTINGS.updates
  const made = phases
    .filter(({ kind }) => kind === 'PRA-GRPO')
    .reduce((sum, { updates }) => sum + updates, 0)
  const training =
    steps === 0
      ? 'A backbone alone: a shortened supervised warm start without PRA-GRPO'
      : `A supervised warm start, then PRA-GRPO: ${made} policy updates${made < full ? `, where a full run makes ${full}` : ''}`
  const end = stopped ? ' The run was stopped early, so that results are missing.' : ''
  return `${training}. Seed ${seed}, ${escaped(device.name)} (${device.id}), ${Math.round(seconds)} seconds.${end}`
}

function scoresTable(run: Run): string {
  const systems = systemsOf(run)
  const head = systems.map(([name]) => `<th scope="col">${name}</th>`).join('')
  const rows = SCORES.map(([title, key]) => {
    const cells = systems.map(([, scores]) => `<td>${scores?.[key].toFixed(3) ?? '–'}</td>`)
    return `<tr><th scope="row">${title}</th>${cells.join('')}</tr>`
  })
  return `<table>
<caption>Shares of ${run.questions} ${run.split} questions, answered greedily.</caption>
<thead><tr><td></td>${head}</tr></thead>
<tbody>${rows.join('\n')}</tbody>
</table>
${confidenceNote(run)}`
}

function confidenceNote({ confidence }: Run): string {
  if (confidence === undefined) return ''
  const { box, answer } = confidence
  return `<p class="note">On average the Perceiver gives its box a probability of ${box.toFixed(2)}, to compare
with the hit rate, and the Reasoner its answer one of ${answer.toFixed(2)}, to compare with the accuracy.</p>`
}

async function curveFigure(run: Run): Promise<string> {
  if (run.curve.length < 2) {
    const reason =
      run.steps === 0
        ? 'This run has no policy updates, and so no curve.'
        : 'The run was stopped before the curve had two points.'
    return `<p class="note">${reason}</p>`
  }
  const key = (kind: string, colour: string, name: string): string =>
    `<li><span class="${kind}" style="background:${colour}"></span>${name}</li>`
  return `<figure>
${await curveSvg(run)}
<div class="keys">
<ul>${SCORES.map(([name, score]) => key('line', LINES[score], name)).join('\n')}</ul>
<ul>${key('band', BANDS.perceiver, 'Perceiver trains')}
${key('band', BANDS.reasoner, 'Reasoner trains')}</ul>
</div>
<figcaption>Measured on validation canvases, whose digits are neither trained nor tested on.</figcaption>
</figure>`
}

function examplesList({ examples, split, steps }: Run, images: readonly ExampleImages[]): string {
  if (examples.length === 0) {
    return '<p class="note">The run was stopped before there were any.</p>'
  }
  const whose = steps === 0 ? 'the backbone' : 'the trained system'
  const cards = examples.map((example, i) => card(example, images[i] as ExampleImages))
  return `<p class="note">The first ${examples.length} ${split} canvases, one question each, answered by ${whose}.
Yellow: the Perceiver’s box, and the crop that the Reasoner saw. Dashed: where the digit is, if the
box missed it. Percentages are each policy’s own probability of its choice.</p>
<div class="cards">
${cards.join('\n')}
</div>`
}

function card(example: Example, images: ExampleImages): string {
  const { question, cell, cellProbability, answer, answerProbability, truth, hit } = example
  const right = answer === truth
  const [row, column] = [Math.floor(cell / LATTICE), cell % LATTICE]
  const description = `The canvas with the Perceiver’s box in row ${row}, column ${column}, which ${hit ? 'holds' : 'misses'} the digit, and the crop of that box.`
  const fact = (term: string, value: string, more: string): string =>
    `<div><dt>${term}</dt><dd>${value} <small>${more}</small></dd></div>`
  return `<article class="${right ? 'right' : 'wrong'}">
<h3>${question}</h3>
${evidenceSvg(example, images, description)}
<dl>
${fact('Answer', `<b>${answer}</b>`, percent(answerProbability))}
${fact('Truth', `<b>${truth}</b>`, right ? '✓ right' : '✗ wrong')}
${fact('Box', hit ? 'hit' : 'missed', percent(cellProbability))}
</dl>
</article>`
}

function escaped(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;')
}

const STYLE = `
:root {
  color-scheme: light dark;
  --page: #f6f6f3; --surface: #fff; --line: #dfdfd9; --ink: #1c1d20; --muted: #5b5e66;
  --hit: #0b6e99; --reasoner: #b85c00; --right: #19713f; --wrong: #b0322a;
  --perceiver-band: #e4edf5; --reasoner-band: #f8eee0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #111215; --surface: #1b1d21; --line: #33363d; --ink: #ececea; --muted: #a3a8b1;
    --hit: #5bb8e4; --reasoner: #f2a24d; --right: #63cf92; --wrong: #f58d83;
    --perceiver-band: #1a2733; --reasoner-band: #2e251a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 3rem; max-width: 76rem;
  font: 1rem/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
}
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; letter-spacing: -0.015em; }
h2 { margin: 0 0 0.5rem; font-size: 1.125rem; }
h3 { margin: 0 0 0.6rem; font-size: 1rem; }
p { margin: 0.5rem 0; max-width: 44rem; text-wrap: pretty; }
.note, figcaption, caption, footer { font-size: 0.875rem; color: var(--muted); }
header { margin-bottom: 2rem; }
main { display: grid; gap: 2.5rem; }
section { min-width: 0; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; padding-top: 0.5rem; }
th, td { padding: 0.4rem 0; border-bottom: 1px solid var(--line); font-weight: 400; text-align: right; }
th[scope="row"], thead td { text-align: left; }
thead th { color: var(--muted); font-size: 0.875rem; }
td:last-child { font-weight: 650; }
td + td, th + th { padding-left: 1rem; }
.results h2:not(:first-child) { margin-top: 2rem; }
figure { margin: 0; }
figcaption { margin-top: 0.75rem; }
figure svg { display: block; width: 100%; max-width: 30rem; height: auto; }
.keys { display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: 0.8125rem; }
.keys ul { margin: 0.5rem 0 0; padding: 0; list-style: none; }
.keys li { display: flex; align-items: center; gap: 0.5rem; }
.line { width: 1.1rem; height: 3px; border-radius: 2px; }
.band { width: 1.1rem; height: 0.9rem; border: 1px solid var(--line); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem; margin-top: 1rem; }
article { padding: 1rem; background: var(--surface); border: 1px solid var(--line); border-radius: 0.75rem; }
article svg { display: block; width: 100%; height: auto; background: #14161a; border-radius: 0.4rem; }
dl { display: grid; grid-template-columns: repeat(3, 1fr); gap: 0.5rem; margin: 0.75rem 0 0; }
dt { font-size: 0.8125rem; color: var(--muted); }
dd { margin: 0; white-space: nowrap; }
dd b { font-size: 1.375rem; line-height: 1.2; }
dd small { font-size: 0.8125rem; color: var(--muted); }
.right dl > :nth-child(2) small { color: var(--right); font-weight: 600; }
.wrong dl > :nth-child(2) small { color: var(--wrong); font-weight: 600; }
footer { margin-top: 2.5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
@media (min-width: 64rem) {
  main { grid-template-columns: 26rem 1fr; align-items: start; }
  .results { position: sticky; top: 1.5rem; }
}
`
