/** A training run as one self-contained HTML page: it has no script and requests nothing. */
import type { Role } from '../p2r/policy.js'
import type { TrainMetrics } from '../train/local_trainer.js'

/** Of the questions of --validate, with the weights after a step. */
export interface Validation {
  /** Share of the questions that were answered rightly; those that failed count as wrong. */
  accuracy: number
  questions: number
  /** How many have no answer because of an error. */
  failed: number
}

/** A line of metrics.jsonl. */
export interface MetricsLine extends TrainMetrics {
  /** After the steps that were validated. */
  validation?: Validation
}

/** A rollout as it is shown. */
export interface ShownRollout {
  role: Role
  question: string
  truth: string
  /** What the reasoner was shown with boxes drawn in it, or the image alone: a data URL. */
  image: string
  /** The trained role's output. */
  output: string
  /** The frozen role's. */
  counterpart?: string
  answer?: string
  /** Absent where there is an error. */
  reward?: number
  /** What was wrong with the perception, or the error. */
  fault?: string
}

export interface RunPage {
  /** What is trained, as the command has it. */
  title: string
  steps: number
  lines: readonly MetricsLine[]
  /** Of the last step. */
  rollouts: readonly ShownRollout[]
}

interface Series {
  name: string
  /** A class of the style sheet. */
  color: 'first' | 'second' | 'third'
  points: readonly Point[]
}
type Point = readonly [step: number, value: number]

interface Chart {
  title: string
  /** What a unit is. */
  note: string
  series: readonly Series[]
  shown: (value: number) => string
}

export function runPage({ title, steps, lines, rollouts }: RunPage): string {
  const last = lines.at(-1)
  const seconds = lines.reduce((sum, line) => sum + line.seconds, 0)
  const unapplied = lines.filter(({ applied }) => !applied).length
  const notes = [
    `${lines.length} of ${steps} steps in ${duration(seconds)}.`,
    ...(last ? [`Learning rate ${number(last.lr)}.`] : []),
    ...(unapplied
      ? [
          `In ${unapplied} of them the weights stayed as they were: there was no signal, or a gradient was not finite.`,
        ]
      : []),
  ]
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Training of ${escaped(title)}</title>
<link rel="icon" href="data:,">
<style>${style}</style>
</head>
<body>
<header>
<h1>Training of ${escaped(title)}</h1>
<p class="note">${notes.join(' ')}</p>
</header>
<main>
<section aria-label="Curves" class="charts">
${chartsOf(lines)
  .map((chart) => figure(chart, lines.length))
  .join('\n')}
</section>
${samplesSection(rollouts)}
</main>
<footer><p>Drawn from metrics.jsonl. A point is a step; of long runs it is the mean of several.</p></footer>
</body>
</html>
`
}

function chartsOf(lines: readonly MetricsLine[]): Chart[] {
  type Roles = MetricsLine['roles'][number]
  const byRole = (value: (role: Roles) => number): Series[] =>
    (['perceiver', 'reasoner'] as const).map((role, i) => ({
      name: role,
      color: i === 0 ? 'first' : 'second',
      points: lines.flatMap(({ step, roles }) =>
        roles.filter((own) => own.role === role).map((own) => [step + 1, value(own)] as const),
      ),
    }))
  const share = (of: (roles: Roles) => number) => (line: MetricsLine) => {
    const items = line.roles.reduce((sum, { items }) => sum + items, 0)
    return items ? line.roles.reduce((sum, role) => sum + of(role), 0) / items : 0
  }
  const perStep = (name: string, color: Series['color'], value: (line: MetricsLine) => number) => ({
    name,
    color,
    points: lines.map((line) => [line.step + 1, value(line)] as const),
  })
  const validated = lines.flatMap(({ step, validation }) =>
    validation ? [[step + 1, validation.accuracy] as const] : [],
  )
  const percent = (value: number) => `${(100 * value).toFixed(1)} %`
  return [
    {
      title: 'Reward',
      note: 'mean of the rollouts',
      series: byRole((r) => r.rewardMean),
      shown: number,
    },
    ...(validated.length
      ? [
          {
            title: 'Validation',
            note: 'share of right answers, both roles greedy',
            series: [{ name: 'accuracy', color: 'first', points: validated } as const],
            shown: percent,
          },
        ]
      : []),
    {
      title: 'KL',
      note: 'to the reference, nats a token',
      series: byRole((r) => r.kl),
      shown: number,
    },
    { title: 'Entropy', note: 'nats a token', series: byRole((r) => r.entropyMean), shown: number },
    {
      title: 'Length',
      note: 'mean of the completions, tokens',
      series: byRole((r) => r.lengthMean),
      shown: (value) => value.toFixed(1),
    },
    {
      title: 'Cut off',
      note: 'share of completions that the limit of tokens ended',
      series: byRole((r) => (r.items ? r.truncated / r.items : 0)),
      shown: percent,
    },
    {
      title: 'Faults',
      note: 'share of rollouts',
      series: [
        perStep(
          'overlapping boxes',
          'first',
          share((r) => r.faults.overlap),
        ),
        perStep(
          'boxes without a label',
          'second',
          share((r) => r.faults.label),
        ),
        perStep(
          'errors',
          'third',
          share((r) => r.errors),
        ),
      ],
      shown: percent,
    },
    {
      title: 'Gradient norm',
      note: 'before clipping',
      series: [perStep('norm', 'first', (line) => line.gradNorm)],
      shown: number,
    },
    {
      title: 'Speed',
      note: 'tokens a second',
      series: [perStep('tokens', 'first', (line) => line.tokensPerSecond)],
      shown: (value) => value.toFixed(0),
    },
  ]
}

/** The plot in units of its viewBox. */
const plot = { width: 340, height: 150, left: 52, right: 8, top: 8, bottom: 22 } as const
/** At most so many points of a curve. */
const mostPoints = 200

function figure({ title, note, series, shown }: Chart, steps: number): string {
  const drawn = series
    // JSON has no NaN: what a step could not measure is null in metrics.jsonl.
    .map((one) => ({ ...one, points: one.points.filter(([, value]) => Number.isFinite(value)) }))
    .filter(({ points }) => points.length)
  const latest = drawn.map(({ name, points }) => `${name} ${shown(points.at(-1)![1])}`)
  const key = drawn.map(
    ({ name, color, points }) =>
      `<li class="${color}"><span class="line"></span>${name} <b>${shown(points.at(-1)![1])}</b></li>`,
  )
  return `<figure>
<figcaption><h2>${title}</h2><p class="note">${note}</p></figcaption>
${drawn.length ? curves(drawn, steps, shown, `${title}: ${latest.join(', ')}`) : '<p class="note">No values yet.</p>'}
<ul class="key">${key.join('')}</ul>
</figure>`
}

function curves(
  series: readonly Series[],
  steps: number,
  shown: Chart['shown'],
  description: string,
): string {
  const { width, height, left, right, top, bottom } = plot
  const values = series.flatMap(({ points }) => points.map(([, value]) => value))
  const [low, high] = rangeOf(Math.min(...values), Math.max(...values))
  const across = (step: number): string =>
    (left + ((step - 1) / Math.max(1, steps - 1)) * (width - left - right)).toFixed(1)
  const down = (value: number): string =>
    (top + ((high - value) / (high - low)) * (height - top - bottom)).toFixed(1)
  const grid = [low, (low + high) / 2, high].map((value) => {
    const y = down(value)
    return `<path class="grid" d="M${left} ${y}H${width - right}"/><text x="${left - 6}" y="${y}" text-anchor="end" dominant-baseline="middle">${shown(value)}</text>`
  })
  const ends = [...new Set([1, steps])].map(
    (step) =>
      `<text x="${across(step)}" y="${height - 6}" text-anchor="${step === 1 ? 'start' : 'end'}">${step === 1 ? 'step 1' : step}</text>`,
  )
  const lines = series.map(({ color, points }) => {
    const some = thinned(points).map(([step, value]) => `${across(step)} ${down(value)}`)
    const [only, ...more] = some
    if (more.length) return `<polyline class="curve ${color}" points="${some.join(' ')}"/>`
    const [x, y] = only!.split(' ')
    return `<circle class="dot ${color}" cx="${x}" cy="${y}" r="3"/>`
  })
  return `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="${description}">
${[...grid, ...ends, ...lines].join('\n')}
</svg>`
}

/** The axis: from 0 where the values come near it. */
function rangeOf(least: number, most: number): [number, number] {
  const low = least >= 0 && least < most / 2 ? 0 : least
  if (most > low) return [low, most]
  if (low > 0) return [0, 2 * low]
  return low < 0 ? [2 * low, 0] : [0, 1]
}

/** Means of runs of points, where there are more than can be seen. */
function thinned(points: readonly Point[]): Point[] {
  const size = Math.ceil(points.length / mostPoints)
  const made: Point[] = []
  for (let at = 0; at < points.length; at += size) {
    const own = points.slice(at, at + size)
    const mean = (axis: 0 | 1) => own.reduce((sum, point) => sum + point[axis], 0) / own.length
    made.push([mean(0), mean(1)])
  }
  return made
}

function samplesSection(rollouts: readonly ShownRollout[]): string {
  if (!rollouts.length) return ''
  return `<section aria-labelledby="samples">
<h2 id="samples">Rollouts of the last step</h2>
<div class="cards">
${rollouts.map(card).join('\n')}
</div>
</section>`
}

function card(rollout: ShownRollout): string {
  const { role, question, truth, image, output, counterpart, answer, reward, fault } = rollout
  const other = role === 'perceiver' ? 'reasoner' : 'perceiver'
  const fact = (term: string, value: string, kind = ''): string =>
    `<div><dt>${term}</dt><dd${kind}>${escaped(value)}</dd></div>`
  const kind = reward === undefined ? '' : ` class="${reward > 0 ? 'right' : 'wrong'}"`
  return `<article>
<h3>${escaped(question)}</h3>
<img src="${image}" alt="The image${role === 'perceiver' ? ' with the boxes of this output' : ' with the boxes that the reasoner was given'}">
<dl>
${fact('Answer', answer ?? 'none')}
${fact('Truth', truth)}
${fact('Reward', reward === undefined ? 'none' : String(reward), kind)}
</dl>
${fault === undefined ? '' : `<p class="wrong">${escaped(fault)}</p>`}
<h4>${role}, trained</h4>
<pre>${escaped(output) || '(nothing)'}</pre>
${counterpart === undefined ? '' : `<details><summary>${other}, frozen</summary><pre>${escaped(counterpart) || '(nothing)'}</pre></details>`}
</article>`
}

function number(value: number): string {
  return value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(1) : value.toPrecision(3)
}

function duration(seconds: number): string {
  if (seconds < 100) return `${seconds.toFixed(0)} seconds`
  if (seconds < 6000) return `${(seconds / 60).toFixed(0)} minutes`
  return `${(seconds / 3600).toFixed(1)} hours`
}

function escaped(text: string): string {
  return text
    .replaceAll('&', '&amp;')
    .replaceAll('<', '&lt;')
    .replaceAll('>', '&gt;')
    .replaceAll('"', '&quot;')
}

const style = `
:root {
  color-scheme: light dark;
  --page: #f6f6f3; --surface: #fff; --line: #dfdfd9; --ink: #1c1d20; --muted: #5b5e66;
  --first: #0b6e99; --second: #b85c00; --third: #7a3fa0; --right: #19713f; --wrong: #b0322a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #111215; --surface: #1b1d21; --line: #33363d; --ink: #ececea; --muted: #a3a8b1;
    --first: #5bb8e4; --second: #f2a24d; --third: #c79bec; --right: #63cf92; --wrong: #f58d83;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 3rem; max-width: 76rem;
  font: 1rem/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
}
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 0; font-size: 1.125rem; }
h3 { margin: 0 0 0.6rem; font-size: 1rem; white-space: pre-line; overflow-wrap: anywhere; }
h4 { margin: 0.75rem 0 0.25rem; font-size: 0.8125rem; font-weight: 400; color: var(--muted); }
p { margin: 0.25rem 0; text-wrap: pretty; }
.note, footer { font-size: 0.875rem; color: var(--muted); }
header { margin-bottom: 1.5rem; }
main { display: grid; gap: 2.5rem; }
section { min-width: 0; }
.charts, .cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.cards { margin-top: 1rem; align-items: start; }
figure, article {
  margin: 0; padding: 1rem; min-width: 0;
  background: var(--surface); border: 1px solid var(--line); border-radius: 0.75rem;
}
figcaption .note { margin: 0 0 0.5rem; }
figure svg { display: block; width: 100%; height: auto; }
figure text { fill: var(--muted); font-size: 11px; }
.grid { stroke: var(--line); stroke-width: 1; }
.curve { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }
.dot { fill: currentColor; }
.first { color: var(--first); } .second { color: var(--second); } .third { color: var(--third); }
.key { display: flex; flex-wrap: wrap; gap: 0 1rem; margin: 0.5rem 0 0; padding: 0; list-style: none; font-size: 0.8125rem; }
li.first, li.second, li.third { color: var(--ink); }
.key li { display: flex; align-items: center; gap: 0.4rem; }
.key .line { width: 1.1rem; height: 3px; border-radius: 2px; }
.key .first .line { background: var(--first); }
.key .second .line { background: var(--second); }
.key .third .line { background: var(--third); }
img { display: block; width: 100%; max-height: 20rem; object-fit: contain; background: #14161a; border-radius: 0.4rem; }
dl { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 0.5rem; margin: 0.75rem 0 0; }
dt { font-size: 0.8125rem; color: var(--muted); }
dd { margin: 0; font-weight: 650; overflow-wrap: anywhere; }
dd.right { color: var(--right); } .wrong { color: var(--wrong); }
pre { margin: 0; max-height: 12rem; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.8125rem; }
summary { margin-top: 0.75rem; font-size: 0.8125rem; color: var(--muted); cursor: pointer; }
footer { margin-top: 2.5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
`
