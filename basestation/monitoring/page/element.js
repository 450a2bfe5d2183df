// Makes elements. Strings become text nodes, never HTML: names and messages come from devices.

export function element(name, className = "", content = []) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...(Array.isArray(content) ? content : [content]));
  return made;
}
