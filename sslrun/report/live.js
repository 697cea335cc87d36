// Fetch the page again when its runs have changed, and keep the position and the open details.
new EventSource("events").addEventListener("changed", async () => {
  const answer = await fetch("/");
  if (!answer.ok) return;
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  const open = [...document.querySelectorAll("details[open] summary")].map((line) => line.textContent);
  document.querySelector("header").replaceWith(fresh.querySelector("header"));
  document.querySelector("main").replaceWith(fresh.querySelector("main"));
  for (const line of document.querySelectorAll("summary"))
    line.parentNode.open = open.includes(line.textContent);
  prepare();
});
