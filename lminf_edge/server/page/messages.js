/** Messages as the conversation keeps them, and as the server gets them. */

/** What the server gets: the same text for the same message, so that what it has read is not read again. */
export function asSent({ role, content, files, reasoning, tool_calls, tool_call_id, name }) {
  if (role === "user") return { role, content: [...(files ?? []).map(fileText), content].filter(Boolean).join("\n\n") };
  if (role === "tool") return { role, tool_call_id, name, content };
  const calls = tool_calls?.map(({ id, name, arguments: given }) => ({
    id,
    type: "function",
    function: { name, arguments: given },
  }));
  return { role, content, reasoning_content: reasoning, tool_calls: calls }; // what is undefined is not sent
}

const fileText = ({ name, text }) => `${name}:\n\n${text}`;

/** Whether the server has to say something to it. */
export const isAsking = (message) => message?.role === "user" || message?.role === "tool";

/** A text as a list of tools; undefined for an empty one. Throws an Error that says what is wrong. */
export function parseTools(text) {
  if (!text?.trim()) return undefined;
  let tools;
  try {
    tools = JSON.parse(text);
  } catch (error) {
    throw new Error(`The tools are no JSON: ${error.message}`, { cause: error });
  }
  if (!Array.isArray(tools) || !tools.every((tool) => tool?.function?.name)) {
    throw new Error('The tools must be a list: [{"type": "function", "function": {"name": ..., "parameters": ...}}].');
  }
  return tools;
}
