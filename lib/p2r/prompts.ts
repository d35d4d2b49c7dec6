import { checkString, choice } from '../arguments.js'

/** @internal */
export const answerForms = ['mca', 'na', 'free_form'] as const
/** Multiple choice, answered by a letter; a number; any text. */
export type AnswerForm = (typeof answerForms)[number]

/**
 * The prompts of the roles, templates in which {question} is replaced. The reasoner's is `reason` or
 * `reasonWithoutEvidence`, followed by the instruction of its answer form.
 *
 * The meaning is that of Perceive-to-Reason's own prompts (verl/utils/dataset/p2r_dataset.py). For a model
 * that was trained on other wording, give that wording as templates.
 */
export interface Prompts {
  system: string
  perceive: string
  reason: string
  /** For evidence without crops. */
  reasonWithoutEvidence: string
  forms: Readonly<Record<AnswerForm, string>>
}

const inTags =
  'Write down your reasoning in full between <think> and </think>, and after it, between <answer> and </answer>,'

export const defaultPrompts: Prompts = Object.freeze({
  system: 'You are a helpful assistant.',
  perceive:
    'Question: {question}\n' +
    'Find the regions of the image that hold the evidence for answering this question. ' +
    'Reply with JSON and nothing else: a list of boxes with coordinates in thousandths of the ' +
    "image's width and height, each with a few words on what it shows, " +
    '[{"bbox_2d": [x1, y1, x2, y2], "label": "description"}]. ' +
    'Reply with the empty list [] if the whole image is needed.',
  reason:
    'Question: {question}\n' +
    'The regions that matter are outlined in the first image and shown enlarged in the others. ' +
    'Reason step by step.\n',
  reasonWithoutEvidence: 'Question: {question}\nReason step by step.\n',
  forms: Object.freeze({
    mca: `${inTags} the letter of the right option alone (A, B, ...).\n`,
    na: `${inTags} the answer as a number (such as 42 or 3.1).\n`,
    free_form: `${inTags} the answer in words.\n`,
  }),
})

/** Templates that replace the defaults. */
export type PromptOverrides = Partial<Omit<Prompts, 'forms'>> & {
  forms?: Partial<Record<AnswerForm, string>>
}

/** @internal */
export function promptsOf(overrides: PromptOverrides | undefined, op: string): Prompts {
  const all = {
    ...defaultPrompts,
    ...overrides,
    forms: { ...defaultPrompts.forms, ...overrides?.forms },
  }
  for (const [name, template] of Object.entries({ ...all, ...all.forms }))
    if (name !== 'forms') checkString(template, `prompts.${name}`, op)
  return all
}

export function perceivePrompt(prompts: Prompts, question: string): string {
  return fill(prompts.perceive, question)
}

export function reasonPrompt(
  prompts: Prompts,
  a: { question: string; form: AnswerForm; hasEvidence: boolean },
): string {
  const start = a.hasEvidence ? prompts.reason : prompts.reasonWithoutEvidence
  return fill(start, a.question) + fill(prompts.forms[a.form], a.question)
}

/** @internal */
export function checkForm(form: AnswerForm, op: string): AnswerForm {
  return choice(form, answerForms, 'answerForm', op)
}

// split and join, because replaceAll would interpret $& in a question.
function fill(template: string, question: string): string {
  return template.split('{question}').join(question)
}
